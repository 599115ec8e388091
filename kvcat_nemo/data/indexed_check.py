"""Is a Megatron indexed dataset (PREFIX.bin, PREFIX.idx) whole? Asked before anything is started.

Megatron itself maps what is there: a truncated .bin shows as an error in the middle of training, an empty one as
"cannot mmap an empty file", a damaged index as an assertion without a name.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


@dataclass(frozen=True)
class IndexedFacts:
    """What the index of a dataset says."""

    sequences: int
    documents: int
    tokens: int
    dtype: str


def check_indexed(prefix: str | os.PathLike) -> IndexedFacts:
    """Compare the two files of a dataset with what its index says. Reads the index, not the tokens.

    Raises:
        ValueError: naming the file that is missing, empty, truncated or no index.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (tokens, index):
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be read by this user")
    size = index.stat().st_size
    with index.open("rb") as stream:
        head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size or head[:9] != _MAGIC:
            raise ValueError(f"{index} is no Megatron index (it does not begin with {_MAGIC[:7].decode()})")
        _, version, code, sequences, documents = _HEADER.unpack(head)
        if version != 1 or code not in _DTYPES:
            raise ValueError(f"{index} is damaged: version {version}, type code {code}")
        needed = _HEADER.size + sequences * (4 + 8) + documents * 8
        if size < needed:
            raise ValueError(
                f"{index} is truncated: {size:,} bytes, its {sequences:,} sequences and {documents - 1:,} documents need {needed:,}"
            )
        if not sequences:
            raise ValueError(f"{index} holds no sequence")
        lengths = np.fromfile(stream, np.int32, sequences)
        pointers = np.fromfile(stream, np.int64, sequences)
        ends = np.fromfile(stream, np.int64, documents)
    width = np.dtype(_DTYPES[code]).itemsize
    expected = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * width])
    if (lengths < 0).any() or not np.array_equal(pointers, expected):
        raise ValueError(f"{index} is damaged: the sequences' places do not follow from their lengths")
    if not documents or ends[-1] != sequences or (np.diff(ends) < 0).any():
        raise ValueError(f"{index} is damaged: its documents do not end with its sequences")
    count = int(lengths.sum(dtype=np.int64))
    if tokens.stat().st_size != count * width:
        raise ValueError(
            f"{tokens} has {tokens.stat().st_size:,} bytes, its index promises {count * width:,} ({count:,} tokens): "
            "truncated, or of another dataset"
        )
    if not count:
        raise ValueError(f"{tokens} holds no token")
    return IndexedFacts(int(sequences), int(documents) - 1, count, _DTYPES[code])


def sequence_lengths(prefix: str | os.PathLike) -> np.ndarray:
    """[documents] tokens of each, mapped from the index of a dataset that `check_indexed` found whole."""
    index = Path(f"{prefix}.idx")
    with index.open("rb") as stream:
        sequences = _HEADER.unpack(stream.read(_HEADER.size))[3]
    return np.memmap(index, np.int32, "r", _HEADER.size, (sequences,))
