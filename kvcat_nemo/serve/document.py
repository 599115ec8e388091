"""A servable cache's file, read and checked, and the ids that stand for it in a prompt.

Engines know a cached prefix by its token ids. A compressed one has none: as many ids are drawn from the sha256 of the file, so
that two documents, or two versions of one, never share a prefix.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.common.files import sha256_of
from kvcat_nemo.compress.cache import KVCache
from kvcat_nemo.compress.servable import servable_facts
from kvcat_nemo.compress.storage import load


@dataclass(frozen=True)
class Document:
    """What is known of a document without its slots; plain data."""

    path: str
    sha256: str
    """Of the file."""
    slots: int
    dtype: str
    """Of keys and values: float32, bfloat16 or float16."""
    text_tokens: int
    made_in: dict[str, str] | None
    """The chat template in which the document was compressed (tokens.ChatForm.facts); None: without one."""
    facts: dict[str, Any]

    def placeholder_ids(self, vocab_size: int) -> list[int]:
        """One id for each slot, drawn from the file's sha256: the same for the same file, whatever serves it."""
        wanted = 8 * self.slots
        stream = hashlib.shake_256(b"kvcat document " + self.sha256.encode()).digest(wanted)
        return [int.from_bytes(stream[at : at + 8], "big") % vocab_size for at in range(0, wanted, 8)]


def read_document(path: str | Path, *, sha256: str | None = None) -> tuple[Document, KVCache]:
    """Read a servable cache.

    Args:
        sha256: what the file's must be; None: any.

    Raises:
        ValueError: names the file when it is missing, cut off, damaged, swapped for another, or not in the servable form.
    """
    path = Path(path)
    cache = load(path)
    found = sha256_of(path)
    if sha256 not in (None, found):
        raise ValueError(
            f"{path}: the file was exchanged while it was served (sha256 {found[:12]}…, before {sha256[:12]}…); start the"
            " server again"
        )
    facts = servable_facts(cache, str(path))
    return (
        Document(
            str(path),
            found,
            facts["slots"],
            facts["dtype"],
            facts["text_tokens"],
            _template(path, cache.facts),
            cache.facts,
        ),
        cache,
    )


def _template(path: Path, facts: dict[str, Any]) -> dict[str, str] | None:
    ids = facts.get("ids") or {}
    made = ids.get("chat_template") if isinstance(ids, dict) else None
    if made is not None and not (
        isinstance(made, dict) and all(isinstance(made.get(x), str) for x in ("name", "sha256", "after"))
    ):
        raise ValueError(
            f"{path}: damaged cache file (ids.chat_template = {made!r}); compress the text again"
        )
    return made
