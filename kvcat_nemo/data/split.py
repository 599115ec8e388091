"""Which document goes where: a first pass over the texts that decides it before anything is tokenised.

The decision depends on a document's text and the seed alone: not on file names, order or format. Adding documents
to a corpus later moves none of the old ones from one split to the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvcat_nemo.data.reading import Document

SKIP, TRAIN, HELD_OUT = range(3)


@dataclass(frozen=True)
class Plan:
    """What to do with each document, in reading order."""

    verdicts: bytes
    """One byte per document: SKIP, TRAIN or HELD_OUT."""
    empty: int
    """Documents without a visible character."""
    duplicates: int
    """Documents whose exact text came before."""
    characters: int
    """Characters in the documents that stay."""
    fingerprint: str
    """sha256 over the texts of all documents in order."""

    def count(self, verdict: int) -> int:
        return self.verdicts.count(verdict)


def position(text: str, seed: int) -> float:
    """A document's place in [0, 1): it is held out when this is below the held-out share."""
    digest = hashlib.sha256(f"{seed}\n".encode() + text.encode("utf-8")).digest()
    return int.from_bytes(digest[:7]) / 2**56


def plan_split(
    documents: Iterable[Document],
    held_out: float,
    seed: int,
    step: Callable[[Document], None] = lambda _: None,
) -> Plan:
    """Read all documents once and assign each to a split; exact duplicates and empty texts are skipped.

    A corpus so small that one split would stay empty gives it the document nearest to the border, if it has two.

    Args:
        documents: in reading order. Memory holds about 100 bytes for each, not the texts.
        held_out: share of the documents to hold out, 0 ≤ held_out < 1; 0 holds out none.
        seed: changes which documents these are.
        step: called with each document.

    Raises:
        ValueError: `held_out` out of range, no document with text, or a held-out split asked of one document.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}; it must be at least 0 and below 1")
    verdicts, seen, everything = bytearray(), set(), hashlib.sha256()
    empty = duplicates = characters = 0
    nearest = {TRAIN: (2.0, -1), HELD_OUT: (2.0, -1)}  # distance to the border, index
    for index, document in enumerate(documents):
        step(document)
        digest = hashlib.sha256(document.text.encode("utf-8")).digest()
        everything.update(digest)
        if not document.text.strip():
            empty += 1
            verdicts.append(SKIP)
        elif digest[:16] in seen:
            duplicates += 1
            verdicts.append(SKIP)
        else:
            seen.add(digest[:16])
            characters += len(document.text)
            place = position(document.text, seed)
            verdict = HELD_OUT if place < held_out else TRAIN
            verdicts.append(verdict)
            nearest[verdict] = min(nearest[verdict], (abs(place - held_out), index))
    if not seen:
        raise ValueError(f"no document with text ({empty} empty ones)")
    if held_out:
        if len(seen) == 1:
            raise ValueError("one document can't be split: pass held-out 0, or give more documents")
        for verdict, other in ((TRAIN, HELD_OUT), (HELD_OUT, TRAIN)):
            if verdict not in verdicts:
                verdicts[nearest[other][1]] = verdict
    return Plan(bytes(verdicts), empty, duplicates, characters, everything.hexdigest())
