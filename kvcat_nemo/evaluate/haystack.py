"""Text to hide things in: made-up sentences of our own, or the sentences of local files."""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kvcat_nemo.common.files import sha256_of
from kvcat_nemo.data.reading import find_files
from kvcat_nemo.evaluate.windows import corpora_from_files


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


NAMES = _words(
    """
    Ada, Boris, Clara, Dmitri, Edith, Felix, Greta, Hugo, Irene, Jonas, Klara, Lena, Marco, Nadia, Oscar,
    Paula, Quentin, Rosa, Stefan, Thea, Ulrich, Vera, Walter, Zoe
    """
)
NOUNS = _words(
    """
    kettle, lantern, river, garden, letter, bridge, market, violin, window, orchard, harbour, ladder,
    blanket, compass, meadow, station, candle, basket, mountain, library, pencil, teapot, bicycle, forest,
    mirror, pebble, saddle, thimble, umbrella, wagon, anchor, button, carpet, dragon, engine, feather,
    guitar, hammer, island, jacket
    """
)
ADJECTIVES = _words(
    """
    amber, broad, clever, dusty, early, faded, gentle, hollow, idle, jolly, keen, lonely, mellow, narrow,
    old, patient, quiet, rusty, silent, tidy, upper, velvet, warm, young, yellow, brave, copper, distant,
    eager, frozen, green, humble
    """
)
_VERBS = _words(
    """
    found, painted, carried, repaired, admired, forgot, described, sold, watched, borrowed, measured,
    cleaned, missed, praised, sketched, visited
    """
)
_PLACES = _words(
    """
    near the old mill, behind the school, at the edge of town, on the way home, by the shore, under the
    stairs, in the next valley, across the square, beside the road, in the rain
    """
)
_TIMES = _words(
    """
    in the morning, after lunch, before the storm, last spring, on a cold evening, once again, without a
    word, for the first time, as if by chance, every other week
    """
)


def made_up(rng: random.Random) -> Iterator[str]:
    """Endless plain sentences without a digit."""
    pick = rng.choice
    while True:
        what = f"the {pick(ADJECTIVES)} {pick(NOUNS)}"
        who, other = rng.sample(NAMES, 2)
        forms = (
            f"{who} {pick(_VERBS)} {what} {pick(_PLACES)}.",
            f"{pick(_TIMES).capitalize()}, {who} {pick(_VERBS)} {what}.",
            f"{who} and {other} {pick(_VERBS)} {what} {pick(_TIMES)}.",
            f"{what.capitalize()} {pick(_PLACES)} was not the one that {who} {pick(_VERBS)}.",
        )
        yield pick(forms)


def sentences_of_files(sources: Iterable[str | Path]) -> list[str]:
    """The sentences of local text files or folders, 20 to 400 characters each, in reading order.

    Raises:
        ValueError: no such file, nothing readable, or too few sentences to hide something in.
    """
    sources = list(sources)
    found = []
    for documents in corpora_from_files(sources).values():
        for document in documents:
            text = re.sub(r"\s+", " ", document.text)
            found += [s for s in re.split(r"(?<=[.!?]) (?=[A-Z“\"'])", text) if 20 <= len(s) <= 400]
    if len(found) < 20:
        raise ValueError(
            f"text: only {len(found)} sentences in {', '.join(map(str, sources))}; give more text"
        )
    return found


def text_fingerprint(sources: Iterable[str | Path]) -> str:
    """sha256 over the contents of the files that `sentences_of_files` reads; "made up" when there are none."""
    files = find_files(sources) if (sources := list(sources)) else []
    if not files:
        return "made up"
    return hashlib.sha256("".join(sha256_of(file) for file in files).encode()).hexdigest()


def stream(sentences: list[str], rng: random.Random) -> Iterator[str]:
    """Endless sentences: of the list from a random place on, or made up when it is empty."""
    if not sentences:
        return made_up(rng)
    start = rng.randrange(len(sentences))
    return itertools.islice(itertools.cycle(sentences), start, None)


def filled(
    encode: Callable[[str], list[int]],
    sentences: Iterator[str],
    needles: list[tuple[float, str]],
    length: int,
) -> list[int]:
    """Token ids of sentences with needles among them: as many whole sentences as fit into `length` tokens with them.

    Args:
        needles: (depth, sentence): 0 stands first, 1 last; between, before the share `depth` of the haystack's tokens.

    Raises:
        ValueError: when not even the needles fit.
    """
    hidden = [(depth, encode(f" {needle}")) for depth, needle in needles]
    room = length - sum(len(ids) for _, ids in hidden)
    if room < 0:
        raise ValueError(f"length={length}: what is to be hidden alone has {length - room} tokens; give more")
    hay: list[list[int]] = []
    total = 0
    while total + len(ids := encode(f" {next(sentences)}")) <= room:
        hay.append(ids)
        total += len(ids)
    starts = [0, *itertools.accumulate(map(len, hay))]  # borders between sentences
    pieces: list[list[list[int]]] = [[] for _ in starts]
    for depth, ids in hidden:
        border = min(range(len(starts)), key=lambda i: abs(starts[i] - depth * total))
        pieces[border].append(ids)
    out: list[int] = []
    for border, piece in enumerate(pieces):
        for ids in piece + hay[border : border + 1]:
            out += ids
    return out
