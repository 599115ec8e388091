"""Synthetic long-context tasks in the manner of RULER (arXiv 2404.06654), wording and lists of our own.

Each makes one example: the context's token ids (at most `length`), a question, the answer's first words, the answers
that must come, and how many tokens they may take. The same random generator gives the same example.

    niah-single      one key → number pair hidden in text, asked for
    niah-multikey    four pairs, one asked for
    niah-multivalue  one key with four numbers, all asked for
    niah-multiquery  four pairs, all asked for
    variable-tracking  a chain of five variables that share a value, among text and a chain of another value; all names
    common-words     a list in which ten words stand ten times as often as the others (five times below 1024 tokens);
                     those ten
    frequent-words   made-up words with frequencies that fall by a power law; the three most frequent
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

from kvcat_nemo.evaluate.haystack import ADJECTIVES, NOUNS, filled, stream

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Example:
    """One question of a task."""

    ids: list[int]
    """The context, without a first special token."""
    question: str
    """Follows the context."""
    cue: str
    """Follows the question; the answer goes on from it."""
    answers: tuple[str, ...]
    """All must come."""
    max_new_tokens: int


def _keys(rng: random.Random, count: int) -> list[str]:
    pairs = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    return rng.sample(pairs, count)


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [str(value) for value in rng.sample(range(1_000_000, 10_000_000), count)]


def _room(encode: Encode, answers: list[str]) -> int:
    return len(encode(" " + ", ".join(answers))) + 8  # some words around them


def _niah(
    encode: Encode, rng: random.Random, length: int, text: list[str], pairs: list, asked: list[str]
) -> Example:
    needles = [(rng.random(), f"The code of the {key} is {value}.") for key, value in pairs]
    ids = filled(encode, stream(text, rng), needles, length)
    answers = [value for key, value in pairs if key in asked]
    if len(answers) == 1:
        question, cue = f"What is the code of the {asked[0]}?", f" The code of the {asked[0]} is"
    elif len(asked) == 1:
        question, cue = f"What are all the codes of the {asked[0]}?", f" The codes of the {asked[0]} are"
    else:
        names = ", ".join(f"the {key}" for key in asked)
        question, cue = f"What are the codes of {names}, in this order?", " The codes are"
    return _example(ids, question, cue, answers, encode)


def _example(ids: list[int], question: str, cue: str, answers: list[str], encode: Encode) -> Example:
    return Example(ids, f"\n\nQuestion: {question}\nAnswer:", cue, tuple(answers), _room(encode, answers))


def niah_single(encode: Encode, rng: random.Random, length: int, text: list[str]) -> Example:
    keys = _keys(rng, 1)
    return _niah(encode, rng, length, text, list(zip(keys, _numbers(rng, 1), strict=True)), keys)


def niah_multikey(encode: Encode, rng: random.Random, length: int, text: list[str]) -> Example:
    keys = _keys(rng, 4)
    return _niah(
        encode, rng, length, text, list(zip(keys, _numbers(rng, 4), strict=True)), [rng.choice(keys)]
    )


def niah_multivalue(encode: Encode, rng: random.Random, length: int, text: list[str]) -> Example:
    keys = _keys(rng, 1)
    return _niah(encode, rng, length, text, [(keys[0], value) for value in _numbers(rng, 4)], keys)


def niah_multiquery(encode: Encode, rng: random.Random, length: int, text: list[str]) -> Example:
    keys = _keys(rng, 4)
    return _niah(encode, rng, length, text, list(zip(keys, _numbers(rng, 4), strict=True)), keys)


def variable_tracking(encode: Encode, rng: random.Random, length: int, text: list[str]) -> Example:
    names: list[str] = []
    while len(names) < 10:
        name = "".join(rng.choices(string.ascii_uppercase, k=4))
        names += [] if name in names else [name]
    values = [str(value) for value in rng.sample(range(10_000, 100_000), 2)]
    needles = []
    for value, chain in zip(values, (names[:5], names[5:]), strict=True):
        # A link never stands before the one that it refers to.
        for depth, link, source in zip(
            sorted(rng.random() for _ in chain), chain, [value, *chain], strict=False
        ):
            needles.append((depth, f"Set variable {link} to {source}."))
    ids = filled(encode, stream(text, rng), sorted(needles, key=lambda needle: needle[0]), length)
    question = f"Which variables end up with the value {values[0]}? Name all five."
    return _example(ids, question, " The variables are", names[:5], encode)


def _listed(encode: Encode, words: list[str]) -> list[int]:
    return encode(" ".join(f"{number}. {word}" for number, word in enumerate(words, 1)))


def common_words(encode: Encode, rng: random.Random, length: int, text: list[str]) -> Example:
    vocabulary = rng.sample(NOUNS, len(NOUNS))
    common = vocabulary[:10]
    rest = vocabulary[10:] + [
        f"{a} {n}" for a in rng.sample(ADJECTIVES, len(ADJECTIVES)) for n in vocabulary[10:]
    ]
    best: list[int] = []
    # The largest list that fits. Ten to one, but five to one where ten words ten times would be the whole context.
    low, ratio, order = max(1, length // 2048), 10 if length >= 1024 else 5, rng.random()
    for uncommon in _growing(len(rest)):
        words = common * (ratio * low) + rest[:uncommon] * low
        random.Random(f"{order} {uncommon}").shuffle(words)
        ids = _listed(encode, words)
        if len(ids) > length:
            break
        best = ids
    if not best:
        raise ValueError(f"length={length}: too short for common-words; give at least {len(ids)}")
    return _example(
        best, "Which ten words stand most often in the list?", " The ten words are", common, encode
    )


def _growing(most: int) -> list[int]:
    sizes = [5]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 5, int(sizes[-1] * 1.1))))
    return sizes


def frequent_words(encode: Encode, rng: random.Random, length: int, text: list[str]) -> Example:
    made: list[str] = []
    while len(made) < 60:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        made += [] if word in made else [word]
    best: list[int] = []
    order = rng.random()
    for first in range(8, 1 << 20, 4):
        # Frequencies first/k²: a power law of exponent 2.
        words = [word for k, word in enumerate(made, 1) for _ in range(round(first / k**2))]
        random.Random(f"{order} {first}").shuffle(words)
        ids = encode(" ".join(words))
        if len(ids) > length:
            break
        best = ids
    if not best:
        raise ValueError(f"length={length}: too short for frequent-words; give at least {len(ids)}")
    question = "Which three words of the coded text above stand in it most often?"
    return _example(best, question, " The three words are", made[:3], encode)


TASKS: dict[str, Callable[[Encode, random.Random, int, list[str]], Example]] = {
    "niah-single": niah_single,
    "niah-multikey": niah_multikey,
    "niah-multivalue": niah_multivalue,
    "niah-multiquery": niah_multiquery,
    "variable-tracking": variable_tracking,
    "common-words": common_words,
    "frequent-words": frequent_words,
}
"""Name → maker(encode, random generator, length in tokens, sentences to hide in or [] for made-up ones).

Raises:
    ValueError: the length does not hold the smallest example.
"""
