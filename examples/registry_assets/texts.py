"""Plain text out of the formats that packages carry: HTML pages, SWORD modules, R's data files."""

from __future__ import annotations

import html.parser
import re
import struct
import zlib
from collections.abc import Iterator

_BLOCKS = frozenset(
    [
        "p",
        "div",
        "br",
        "li",
        "ul",
        "ol",
        "dl",
        "dt",
        "dd",
        "pre",
        "tr",
        "table",
        "title",
        "section",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
    ]
)
_SKIPPED = frozenset(["head", "script", "style", "nav", "note"])


class _Text(html.parser.HTMLParser):
    def __init__(self, skip_classes: frozenset[str]):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skip_classes = skip_classes
        self.skipping: list[str] = []  # open tags since the first skipped one
        self.pre = 0

    def handle_starttag(self, tag, attrs):
        classes = (dict(attrs).get("class") or "").split()
        if self.skipping or tag in _SKIPPED or self.skip_classes.intersection(classes):
            if tag not in ("br", "img", "meta", "link", "hr", "input"):
                self.skipping.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n")
            self.pre += tag == "pre"

    def handle_startendtag(self, tag, attrs):
        if not self.skipping and tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag):
        if self.skipping:
            # Back to the tag's own opening; an unclosed <li> or <p> inside must not keep us here.
            if tag in self.skipping:
                while self.skipping.pop() != tag:
                    pass
        elif tag in _BLOCKS:
            self.parts.append("\n")
            self.pre -= tag == "pre"

    def handle_data(self, data):
        if not self.skipping:
            self.parts.append(data if self.pre > 0 else re.sub(r"\s+", " ", data))


def html_text(page: str, skip_classes: tuple[str, ...] = ()) -> str:
    """The text of an HTML or XML page: blocks on lines of their own, no head, scripts, navigation or notes.

    Args:
        page: the markup.
        skip_classes: elements of these classes are left out too.
    """
    parser = _Text(frozenset(skip_classes))
    parser.feed(page)
    parser.close()
    text = re.sub(r"[ \t]*\n[ \t]*(?=\n)", "\n", "".join(parser.parts))
    text = re.sub(r"(?m)^ (?=\S)|[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def sword_books(index: bytes, blocks: bytes) -> Iterator[str]:
    """Books of a SWORD module that compresses book by book (zText, zCom): one text each.

    Args:
        index: the file *.bzs (or *.czs): 12 bytes a block, its offset, packed size and size.
        blocks: the file *.bzz (or *.czz).
    """
    for offset, packed, _ in struct.iter_unpack("<III", index):
        if packed:
            text = html_text(zlib.decompress(blocks[offset : offset + packed]).decode("utf-8", "replace"))
            text = re.sub(r"(?m)^ +", "", re.sub(r" {2,}", " ", text))
            if text:
                yield text


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors of a package's lazy-load database (*.rdb), in file order; other objects are passed over.

    Each record is its size (4 bytes, big-endian) and a zlib stream of R's XDR serialisation.
    """
    position = 0
    while position + 4 < len(database):
        stream = zlib.decompressobj()
        data = stream.decompress(database[position + 4 :])
        position = len(database) - len(stream.unused_data)
        if (strings := _xdr_strings(data)) is not None:
            yield strings


def _xdr_strings(data: bytes) -> list[str] | None:
    # "X\n", format version, two R versions; format 3 adds the length and name of the native encoding.
    (version,) = struct.unpack_from(">i", data, 2)
    at = 14
    if version == 3:
        at += 4 + struct.unpack_from(">i", data, at)[0]
    flags, count = struct.unpack_from(">ii", data, at)
    if flags & 0xFF != 16:  # STRSXP
        return None
    at += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, at)
        at += 8
        strings.append(data[at : at + max(length, 0)].decode("utf-8", "replace"))  # −1 marks a missing value
        at += max(length, 0)
    return strings
