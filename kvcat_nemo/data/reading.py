"""Files of any folder as a stream of documents: .jsonl, .jsonl.gz, .txt and .parquet."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvcat_nemo.models.hub import dataset_files, is_dataset

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".parquet")
_ID_FIELDS = ("id", "doc_id", "_id")


@dataclass(frozen=True)
class Document:
    """One text."""

    id: str
    """The record's own id, else `file name:line` (a text file: its name)."""
    text: str


@dataclass
class ReadOptions:
    """How source files are read."""

    text_field: str = "text"
    """Field of a JSON line, or column of a Parquet file, that holds the text."""
    skip_bad: bool = False
    """Count broken records and go on instead of stopping at the first."""
    bad: int = field(default=0, init=False)
    """Broken records met so far."""

    def broken(self, where: str, why: str) -> None:
        """Count a broken record, or raise ValueError naming the place."""
        if not self.skip_bad:
            raise ValueError(f"{where}: {why} (--skip-bad counts broken records instead of stopping)")
        self.bad += 1


def suffix_of(path: Path) -> str | None:
    """The supported suffix `path` ends in, or None."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def names_dataset(source: str | Path) -> bool:
    """Whether a source that is no file here is a dataset of the hub: not a file's name (data/book.txt)."""
    text = str(source)
    return text.startswith("hf://") or (suffix_of(Path(text)) is None and is_dataset(text))


def find_files(sources: Iterable[str | Path]) -> list[Path]:
    """The source files, each once, in an order that doesn't depend on the file system.

    Args:
        sources: files, folders (searched through, hidden files and other kinds left out), glob patterns or hub datasets
            (kvcat_nemo.models.hub), which are fetched.

    Returns:
        Paths sorted within each source; the sources keep their order.

    Raises:
        ValueError: a source that matches nothing, or a file of an unknown kind that was named or matched.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.is_file() and suffix_of(p))
            files = sorted(p for p in inside if not any(x.startswith(".") for x in p.relative_to(path).parts))
        elif path.is_file():
            files = [path]
        else:
            files = sorted(p for p in map(Path, glob.glob(str(source), recursive=True)) if p.is_file())
            if not files and names_dataset(source):
                files = dataset_files(str(source), SUFFIXES)
        if not files:
            what = "holds no" if path.is_dir() else "matches no file; wanted"
            raise ValueError(f"source {str(source)!r} {what} {', '.join(SUFFIXES)} files")
        for file in files:
            if suffix_of(file) is None:
                raise ValueError(f"{file}: unknown kind of file; known: {', '.join(SUFFIXES)}")
            found.setdefault(file.resolve(), file)
    if not found:
        raise ValueError("no source given")
    return list(found.values())


def read_documents(files: Iterable[Path], options: ReadOptions) -> Iterator[Document]:
    """Stream the documents of `files` in order; empty texts are yielded too.

    Raises:
        ValueError: a file that can't be read, or a broken record (see ReadOptions), naming file and line.
    """
    readers = {".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".txt": _read_txt, ".parquet": _read_parquet}
    for file in files:
        yield from readers[suffix_of(file)](file, options)


def _read_jsonl(file: Path, options: ReadOptions) -> Iterator[Document]:
    open_bytes = gzip.open if file.name.lower().endswith(".gz") else open
    with open_bytes(file, "rb") as lines:
        number = 0
        try:
            # Bytes, not text: str.splitlines' exotic line ends (U+2028 …) are legal inside JSON strings.
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
                    document = _document(record, f"{file.name}:{number}", options.text_field)
                except json.JSONDecodeError as error:
                    options.broken(f"{file}, line {number}", f"no JSON at column {error.colno}: {error.msg}")
                except (ValueError, RecursionError) as error:
                    options.broken(f"{file}, line {number}", str(error))
                else:
                    yield document
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{file}: damaged gzip data after line {number} ({error})") from error


def read_text(file: str | Path) -> str:
    """The text of a plain UTF-8 file as it is: line ends stay, a byte order mark goes.

    Raises:
        ValueError: not UTF-8; names file and line.
    """
    data = Path(file).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BrokenText(f"{file}, line {line}", f"not UTF-8 ({error.reason})") from None


class BrokenText(ValueError):
    """A text that cannot be read."""

    def __init__(self, where: str, why: str):
        super().__init__(f"{where}: {why}")
        self.where, self.why = where, why


def _read_txt(file: Path, options: ReadOptions) -> Iterator[Document]:
    try:
        text = read_text(file)
    except BrokenText as error:
        options.broken(error.where, error.why)
    else:
        yield Document(file.name, text)


def _read_parquet(file: Path, options: ReadOptions) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error})") from error
    with table:
        names = table.schema_arrow.names
        if options.text_field not in names:
            raise ValueError(_no_field(file, options.text_field, names))
        columns = [name for name in (options.text_field, *_ID_FIELDS) if name in names]
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for record in batch.to_pylist():
                row += 1
                try:
                    document = _document(record, f"{file.name}:{row}", options.text_field)
                except ValueError as error:
                    options.broken(f"{file}, row {row}", str(error))
                else:
                    yield document


def _no_field(where: object, text_field: str, present: Iterable[str]) -> str:
    names = ", ".join(map(str, present)) or "none"
    return f"{where}: no field {text_field!r}; fields present: {names} (choose one with --text-field)"


def _document(record: object, fallback_id: str, text_field: str) -> Document:
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    if text_field not in record:
        raise ValueError(_no_field("record", text_field, record))
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} is {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is legal JSON but no text
        raise ValueError(f"field {text_field!r} holds a lone surrogate at character {error.start}") from error
    ids = (record[name] for name in _ID_FIELDS if record.get(name) is not None)
    return Document(str(next(ids, fallback_id)), text)
