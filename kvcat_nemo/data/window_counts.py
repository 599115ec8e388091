"""How many windows, epochs and tokens a Megatron dataset has, and whether it is the same as before: from its files alone."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from kvcat_nemo.data.indexed_check import sequence_lengths

MAX_EPOCHS = 100_000
"""No run reads the same tokens more often on purpose; a split of a few tokens asks for it by mistake."""
MAX_INDEX = 1 << 33
"""Entries of an index: a document of an epoch each, 4 bytes. 32 GiB, some twenty epochs of the largest public corpora."""
INDEX_FOLDER = "cache/EpochDataset_indices"
"""Where the order of a dataset's windows is kept, below the dataset's prefix (engine.epochs); Megatron's own lies beside it."""
_BLOCKS, _BLOCK = 256, 4096


def windows_in(epochs: int, tokens: int, seq_length: int) -> int:
    """Windows of so many epochs of so many tokens: the last label is one token further than the last input."""
    return max(epochs * tokens - 1, 0) // seq_length


def epochs_needed(windows: int | None, tokens: int, seq_length: int, *, what: str) -> int:
    """Whole epochs that hold so many windows; None: one epoch.

    Raises:
        ValueError: when there is no token to read, naming `what`.
    """
    if not tokens:
        raise ValueError(
            f"{what} has no token, and {'a pass over it' if windows is None else f'{windows:,} windows'} is asked of it: "
            "give data.split another share, or other data.paths"
        )
    return 1 if windows is None else max(-(-(windows * seq_length + 1) // tokens), 1)


def check_epochs(epochs: int, documents: int, *, what: str) -> None:
    """Refuse an index that no memory holds.

    Raises:
        ValueError: naming `what` and the fix.
    """
    if epochs > MAX_EPOCHS or epochs * documents > MAX_INDEX:
        raise ValueError(
            f"{what} would be read {epochs:,} times ({documents:,} documents); at most {MAX_EPOCHS:,} times and "
            f"{MAX_INDEX:,} documents in all are supported: give more data, or lower trainer.max_steps, "
            "data.global_batch_size or trainer.limit_val_batches"
        )


def split_shares(split: str) -> list[tuple[float, float] | None]:
    """Where train, validation and test begin and end, as shares of the documents; None: a split of no weight.

    Raises:
        ValueError: when the text is not one to three weights.
    """
    try:
        weights = [float(part) for part in str(split).replace("/", ",").split(",")]
    except ValueError:
        weights = []
    good = 1 <= len(weights) <= 3 and all(0 <= w < float("inf") for w in weights) and sum(weights) > 0
    if not good:
        raise ValueError(
            f"data.split={split!r}: give the weights of train, validation and test, such as 980,20,0"
        )
    weights += [0.0] * (3 - len(weights))
    ends = np.cumsum([0.0, *(w / sum(weights) for w in weights)])
    return [(float(a), float(b)) if w else None for a, b, w in zip(ends, ends[1:], weights, strict=False)]


def tokens_of(prefix: str, share: tuple[float, float] = (0.0, 1.0)) -> tuple[int, int]:
    """(documents, tokens) of a share of a dataset, cut between documents as Megatron cuts it."""
    lengths = sequence_lengths(prefix)
    begin, end = (int(round(x * float(len(lengths)))) for x in share)
    return end - begin, int(lengths[begin:end].sum(dtype=np.int64))


@functools.lru_cache(maxsize=64)
def _contents(prefix: str, *_state: int) -> str:
    digest = hashlib.sha256()
    for ending in (".idx", ".bin"):
        path = Path(f"{prefix}{ending}")
        size = path.stat().st_size
        digest.update(f"{ending} {size} ".encode())
        with path.open("rb") as file:
            for start in sorted({int(x) for x in np.linspace(0, max(size - _BLOCK, 0), _BLOCKS)}):
                file.seek(start)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:32]


def contents(prefix: str | os.PathLike) -> str:
    """A digest of a dataset, the same wherever it lies.

    It is of both files' sizes and of 256 blocks of each: enough to tell datasets apart, and quick on any size. It does not
    show a few changed tokens in a large dataset.
    """
    found = [Path(f"{prefix}{ending}").stat() for ending in (".idx", ".bin")]
    return _contents(str(prefix), *(x for one in found for x in (one.st_size, one.st_mtime_ns)))
