"""Megatron's distributed checkpoint format (torch_dist): a streaming writer, and a reader of any slice.

On disk: `.metadata` (a pickled index: global shape and chunks of every key, and where each chunk lies),
`*.distcp` (the chunks, each a torch.save archive), `common.pt` (what is not sharded) and `metadata.json`.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from kvcat_nemo.runs.pickles import check_format, read_index

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILE_BYTES = 4 * 10**9


class CheckpointWriter:
    """Writes chunks as they come; `close` writes the index, without which nothing can be loaded.

    Args:
        folder: an existing empty folder.
        prefixes: every key is listed once per prefix, over the same bytes.
    """

    def __init__(self, folder: Path, prefixes: Sequence[str] = ("",)):
        self._folder, self._prefixes = folder, prefixes
        self._keys: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._where: dict[MetadataIndex, _StorageInfo] = {}
        self._stream = None
        self._files = 0

    def _append(self, write: Callable[[io.BufferedWriter], None]) -> _StorageInfo:
        if self._stream is None or self._stream.tell() > _FILE_BYTES:
            # Several files, so that many ranks can read a large model at once.
            if self._stream is not None:
                self._stream.close()
            self._stream = (self._folder / f"__{self._files}_0.distcp").open("wb")
            self._files += 1
        start = self._stream.tell()
        write(self._stream)
        return _StorageInfo(self._stream.name.rsplit("/", 1)[-1], start, self._stream.tell() - start)

    def add_tensor(self, key: str, chunk: torch.Tensor, shape: Sequence[int], offsets: Sequence[int]) -> None:
        """Write `chunk`, which lies at `offsets` in the global tensor `key` of `shape`."""
        assert len(shape) == len(offsets) == chunk.ndim, key
        where = self._append(lambda stream: torch.save(chunk, stream))
        at = ChunkStorageMetadata(torch.Size(offsets), chunk.shape)
        for prefix in self._prefixes:
            entry = self._keys.setdefault(
                prefix + key,
                TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(shape), []),
            )
            assert entry.properties.dtype == chunk.dtype and entry.size == torch.Size(shape), key
            entry.chunks.append(at)
            self._where[MetadataIndex(prefix + key, at.offsets)] = where

    def add_empty_object(self, key: str, offset: int, count: int) -> None:
        """Write None as entry `offset` of the sharded object `key`, an array of `count`."""
        where = self._append(lambda stream: torch.save([None], stream))
        for prefix in self._prefixes:
            name = f"{prefix}{key}/shard_{offset}_{count}"
            self._keys[name] = BytesStorageMetadata()
            self._where[MetadataIndex(name)] = where

    def close(self) -> None:
        assert self._stream is not None
        self._stream.close()
        torch.save({}, self._folder / "common.pt")
        metadata = Metadata(state_dict_metadata=self._keys, planner_data={}, storage_data=self._where)
        (self._folder / ".metadata").write_bytes(pickle.dumps(metadata))
        # Last: Megatron takes a folder without metadata.json for no checkpoint at all.
        (self._folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")


@dataclass
class _OneTensor(LoadPlanner):
    """Directs what the file reader finds into one tensor, whose corner is at `offsets` in the global tensor."""

    target: torch.Tensor
    offsets: Sequence[int]
    filled: int = field(default=0)

    def set_up_planner(self, *args, **kwargs):
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner

    def resolve_tensor(self, read_item):
        view = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item, tensor):
        self.filled += tensor.numel()


class CheckpointReader:
    """Reads any slice of any tensor of a distributed checkpoint, however it was split when it was saved.

    Attributes:
        shapes: key → global shape, of every tensor.
        dtypes: key → dtype.

    Raises:
        ValueError: when the folder is not a torch_dist checkpoint, or its index is damaged, would run code or names files
            outside of the folder (kvcat_nemo.runs.pickles).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        check_format(self.folder)
        from kvcat_nemo.engine import hardware

        hardware.enable()  # the index that Megatron writes is one of its own classes, so reading it imports Megatron
        self._metadata = read_index(self.folder)
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._reader = FileSystemReader(self.folder)
        self._reader.set_up_storage_reader(self._metadata, True)
        entries = self._metadata.state_dict_metadata
        self._tensors = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        self.shapes = {key: tuple(entry.size) for key, entry in self._tensors.items()}
        self.dtypes = {key: entry.properties.dtype for key, entry in self._tensors.items()}

    def location(self, key: str) -> tuple[tuple[str, int], ...]:
        """File and first byte of every chunk; equal for two names of the same bytes."""
        chunks = self._tensors[key].chunks
        where = [self._metadata.storage_data[MetadataIndex(key, chunk.offsets)] for chunk in chunks]
        return tuple(sorted((info.relative_path, info.offset) for info in where))

    def row_parts(self, key: str) -> int:
        """Into how many parts along its rows a tensor was saved: the tensor parallel size, of a split one."""
        return len({chunk.offsets[0] for chunk in self._tensors[key].chunks})

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """The slice of `key` that starts at `offsets` and has `sizes`, in the stored dtype.

        Raises:
            ValueError: when the chunks in the checkpoint do not cover it exactly once.
        """
        target = torch.empty(tuple(sizes), dtype=self.dtypes[key])
        planner = _OneTensor(target, offsets)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        for item in create_read_items_for_chunk_list(key, self._tensors[key], [wanted]):
            # One at a time: the file reader would otherwise keep the previous chunk until the next is there.
            self._reader.read_data(LoadPlan([item]), planner)
        if planner.filled != prod(sizes):
            raise ValueError(f"{self.folder}: the chunks of {key} do not cover it exactly once")
        return target
