"""Texts → Megatron indexed datasets, written by Megatron-core's own builder: one sequence per document, EOD last."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kvcat_nemo.common.files import sha256_of
from kvcat_nemo.common.folders import check_replaceable, new_folder
from kvcat_nemo.data.dataset_manifest import (
    FORMAT,
    MANIFEST,
    DatasetManifest,
    SplitCounts,
    dataset_fingerprint,
    read_manifest,
)
from kvcat_nemo.data.reading import Document, ReadOptions, find_files, read_documents
from kvcat_nemo.data.split import HELD_OUT, SKIP, TRAIN, Plan, plan_split
from kvcat_nemo.data.tokenizer import DocumentTokenizer, load_tokenizer, threads
from kvcat_nemo.data.window_counts import INDEX_FOLDER
from kvcat_nemo.models.hub import model_folder, pinned, recorded_name
from kvcat_nemo.tokens import IdRules

__all__ = ["DatasetManifest", "build_dataset", "dataset_fingerprint", "read_manifest"]

_SPLITS = {TRAIN: "train", HELD_OUT: "heldout"}
_BATCH_CHARACTERS = 1 << 20


def build_dataset(
    sources: Iterable[str | Path],
    tokenizer_dir: str | Path,
    out_dir: str | Path,
    *,
    held_out: float = 0.1,
    text_field: str = "text",
    seed: int = 1234,
    eod_token: str | None = None,
    bos: str = "auto",
    special_tokens: str = "text",
    workers: int = 2,
    skip_bad: bool = False,
    force: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> DatasetManifest:
    """Tokenise documents, split them by document and write Megatron indexed datasets.

    The folder gets train.bin/.idx, heldout.bin/.idx (unless held_out is 0), *.documents.jsonl with each document's
    id and token count in order, and manifest.json. It appears under its name only when it is complete. Built before
    from the same texts, tokenizer and seed, it is re-used.

    Args:
        sources: files, folders or glob patterns of .jsonl, .jsonl.gz, .txt and .parquet; hub datasets (kvcat_nemo.models.hub).
        tokenizer_dir: Hugging Face folder or hub id with a fast tokenizer.
        out_dir: folder to write.
        held_out: share of documents for the held-out split, in [0, 1).
        text_field: field (.jsonl) or column (.parquet) of the text.
        seed: of the split.
        eod_token: end-of-document token; the tokenizer's end-of-sequence token by default.
        bos, special_tokens: how ids are made of text, as tokens.IdRules.
        workers: tokeniser threads.
        skip_bad: count broken records instead of stopping at the first.
        force: replace a dataset built from other inputs.
        progress: show progress bars.
        say: called with one line per step.

    Returns:
        The manifest; `reused` says whether the dataset had been there.

    Raises:
        ValueError: bad input; names the file and line, the field or the option. Nothing is written then.
    """
    started = time.monotonic()
    out = Path(out_dir)
    sources = [str(source) for source in sources]
    files = find_files(sources)
    tokenizer_dir = model_folder(tokenizer_dir, weights=False, what="tokenizer")
    read = [*files, tokenizer_dir]
    if force or not (out / MANIFEST).exists():
        check_replaceable(out, _our_names, sources=read)
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    tokenizer = load_tokenizer(tokenizer_dir, eod_token, IdRules(bos, special_tokens))

    revisions = sorted({name for file in files if (name := pinned(file))})
    options = ReadOptions(text_field, skip_bad)
    with _bar(progress, desc="read", unit="doc") as bar:
        plan = plan_split(read_documents(files, options), held_out, seed, lambda _: bar.update())
    manifest = DatasetManifest(
        format=FORMAT,
        splits={},
        files={},
        dtype="",
        tokenizer={"path": recorded_name(tokenizer_dir)}
        | {name: getattr(tokenizer, name) for name in ("fingerprint", "vocab_size", "eod_token", "eod_id")}
        | {"bos": bos, "special_tokens": special_tokens, "beginning": tokenizer.beginning},
        source={
            "paths": sources,
            "files": len(files),
            "documents": len(plan.verdicts),
            "empty": plan.empty,
            "duplicates": plan.duplicates,
            "bad": options.bad,
            "fingerprint": plan.fingerprint,
            "text_field": text_field,
        }
        | ({"revisions": revisions} if revisions else {}),
        held_out=held_out,
        seed=seed,
        versions=_versions(),
        seconds=0.0,
    )
    existing = _existing(out, manifest, force)
    if existing is not None:
        say(f"{out}: already built from the same texts, tokenizer and seed, re-used")
        return dataclasses.replace(existing, reused=True)

    with threads(workers), new_folder(out, _our_names, sources=read, replace=force) as folder:
        with _bar(progress, desc="tokenise", unit="char", unit_scale=True, total=plan.characters) as bar:
            documents = read_documents(files, ReadOptions(text_field, skip_bad))
            splits = _write(documents, plan, tokenizer, folder, bar)
        manifest = dataclasses.replace(
            manifest,
            splits=splits,
            dtype=_dtype(tokenizer).__name__,
            files={
                f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in sorted(folder.iterdir())
            },
            seconds=round(time.monotonic() - started, 3),
        )
        manifest.write(folder)
    for name, split in splits.items():
        say(f"{out / name}: {split.documents:,} documents, {split.tokens:,} tokens")
    left_out = {"empty": plan.empty, "duplicate": plan.duplicates, "broken": options.bad}
    if any(left_out.values()):
        say("left out: " + ", ".join(f"{count:,} {kind}" for kind, count in left_out.items() if count))
    return manifest


class _SplitWriter:
    """One split: Megatron's builder plus the list of document ids."""

    def __init__(self, folder: Path, name: str, dtype: type):
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.prefix = str(folder / name)
        self.builder = IndexedDatasetBuilder(self.prefix + ".bin", dtype=dtype)
        self.ids = open(self.prefix + ".documents.jsonl", "w", encoding="utf-8")  # noqa: SIM115 - finish() closes
        self.lengths = array("q")

    def add(self, document_id: str, tokens: list[int]) -> None:
        import torch

        self.builder.add_item(torch.tensor(tokens, dtype=torch.int64))
        self.builder.end_document()
        self.lengths.append(len(tokens))
        record = {"id": document_id, "tokens": len(tokens)}
        self.ids.write(json.dumps(record, ensure_ascii=False) + "\n")

    def finish(self) -> SplitCounts:
        self.builder.finalize(self.prefix + ".idx")
        self.ids.close()
        middle = int(statistics.median(self.lengths))
        lengths = self.lengths
        return SplitCounts(len(lengths), sum(lengths), min(lengths), middle, max(lengths))


def _write(
    documents: Iterable[Document], plan: Plan, tokenizer: DocumentTokenizer, folder: Path, bar
) -> dict[str, SplitCounts]:
    dtype = _dtype(tokenizer)
    writers = {v: _SplitWriter(folder, name, dtype) for v, name in _SPLITS.items() if plan.count(v)}
    started, tokens_done, documents_done = time.monotonic(), 0, 0
    for batch in _batches(documents, plan):
        encoded = tokenizer.encode([document.text for _, document in batch])
        for (verdict, document), tokens in zip(batch, encoded, strict=True):
            writers[verdict].add(document.id, tokens)
        documents_done += len(batch)
        tokens_done += sum(map(len, encoded))
        rate = tokens_done / (time.monotonic() - started)
        bar.set_postfix_str(f"{documents_done:,} docs, {rate:,.0f} tokens/s", refresh=False)
        bar.update(sum(len(document.text) for _, document in batch))
    return {_SPLITS[verdict]: writer.finish() for verdict, writer in writers.items()}


def _batches(documents: Iterable[Document], plan: Plan) -> Iterator[list[tuple[int, Document]]]:
    batch, characters = [], 0
    try:
        for verdict, document in zip(plan.verdicts, documents, strict=True):
            if verdict == SKIP:
                continue
            batch.append((verdict, document))
            characters += len(document.text)
            if characters >= _BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    except ValueError as error:
        raise ValueError(f"the source files changed while they were read ({error}); build again") from error
    if batch:
        yield batch


def _dtype(tokenizer: DocumentTokenizer) -> type:
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(tokenizer.vocab_size)


def _our_names(out: Path) -> set[str] | None:
    """What of a folder was written here: the files of its manifest. None when that is missing or damaged."""
    try:
        stored = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        files = stored["files"]
        if not (isinstance(files, dict) and isinstance(stored["splits"], dict) and "tokenizer" in stored):
            return None  # a manifest of somebody else's
        names = {MANIFEST, *files}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # The orders of windows, ours and Megatron's, are kept beside the data. They go with it: for other data they would be wrong.
    folders = (INDEX_FOLDER, "cache/GPTDataset_indices")
    caches = tuple(f"{name}/{folder}/" for name in _SPLITS.values() for folder in folders)
    files = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    return names | {name for name in files if name.startswith(caches)}


def _existing(out: Path, wanted: DatasetManifest, force: bool) -> DatasetManifest | None:
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        existing = read_manifest(out)
        theirs, ours = existing.inputs(), wanted.inputs()
        if theirs == ours:
            return existing
        why = "built from other inputs: " + ", ".join(k for k in ours if theirs.get(k) != ours[k])
        if theirs["beginning"] != ours["beginning"]:
            there, now = theirs["beginning"], ours["beginning"]
            option = "; --bos never builds it as it is" if not there else ""
            why += f" (ids before each document: {there or 'none'} there, {now or 'none'} now{option})"
    except ValueError as error:
        why = str(error)
    if not force:
        raise ValueError(f"{out} is there already, {why} (--force replaces it)")
    return None


def _bar(progress: bool, **options):
    from tqdm import tqdm

    return tqdm(disable=not progress, **options)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("kvcat-nemo", "megatron-core", "tokenizers", "transformers")}
