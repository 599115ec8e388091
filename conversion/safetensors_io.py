"""Sharded safetensors, read and written one tensor at a time.

The safetensors library checks each file's header, of those read and of those written. Bytes are read and written as plain files:
the library maps files, and mapped pages count as the process' memory; and it writes only what is in memory as a whole.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from kvcat_nemo.models.weights import INDEX, SINGLE, StoredTensor, find_weights, read_header

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, from the start of the file."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _stored(name: str, tensor: StoredTensor) -> Stored:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{tensor.file}: {name} has dtype {tensor.dtype}; supported are {', '.join(DTYPES)}")
    return Stored(tensor.file, DTYPES[tensor.dtype], tensor.shape, tensor.start)


class SafetensorsFolder:
    """The weights of a Hugging Face folder, one file or sharded with an index (kvcat_nemo.models.weights).

    Raises:
        ValueError: for pickled weights, truncated files, shards that are missing or disagree with the index, and files
            that another reader would take instead.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.weights = find_weights(folder)
        self.tensors = {name: _stored(name, tensor) for name, tensor in self.weights.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype, in memory of its own."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.start)
            view = _bytes_of(tensor)
            while len(view):
                count = stream.readinto(view)
                if not count:
                    raise ValueError(f"{stored.file} became shorter while {name} was read")
                view = view[count:]
        return tensor


class SafetensorsWriter:
    """Writes tensors in any order into shards that are laid out beforehand.

    Args:
        tensors: name → (shape, dtype), in the order they are to lie in the files.
        max_shard_size: bytes of tensor data in one file; a larger tensor gets a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        max_shard_size: int,
    ):
        shards: list[list[str]] = [[]]
        filled = 0
        nbytes = {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}
        for name in tensors:
            if shards[-1] and filled + nbytes[name] > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += nbytes[name]
        self._stored: dict[str, Stored] = {}
        self._unwritten = set(tensors)
        index = {}
        for number, names in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            # Wider types first: every tensor then starts at a multiple of its item size.
            names.sort(key=lambda name: -tensors[name][1].itemsize)
            header, offset = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                shape, dtype = tensors[name]
                end = offset + nbytes[name]
                header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
                offset = end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with (folder / file).open("wb") as stream:
                stream.write(struct.pack("<Q", len(text)) + text)
                stream.truncate(8 + len(text) + offset)
            for name in names:
                shape, dtype = tensors[name]
                start = 8 + len(text) + header[name]["data_offsets"][0]
                self._stored[name] = Stored(folder / file, dtype, tuple(shape), start)
                index[name] = file
        if len(shards) > 1:
            body = {
                "metadata": {"total_size": sum(nbytes.values())},
                "weight_map": dict(sorted(index.items())),
            }
            (folder / INDEX).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        stored = self._stored[name]
        assert tuple(tensor.shape) == stored.shape and tensor.dtype == stored.dtype, name
        self._unwritten.remove(name)
        view, position = _bytes_of(tensor.contiguous()), stored.start
        with stored.file.open("r+b", buffering=0) as stream:
            while len(view):
                count = os.pwrite(stream.fileno(), view, position)
                view, position = view[count:], position + count

    def close(self) -> None:
        assert not self._unwritten, f"never written: {sorted(self._unwritten)[:3]}"
        for file in {stored.file for stored in self._stored.values()}:
            read_header(file)


def find_not_finite(tensor: torch.Tensor) -> str | None:
    """ "NaN" or "infinity" if the tensor holds one; looks at it in pieces, to stay small beside it."""
    for piece in tensor.reshape(-1).split(4_000_000):
        if not torch.isfinite(piece).all():
            return "NaN" if torch.isnan(piece).any() else "infinity"
    return None
