"""What may be in the index of a distributed checkpoint: `.metadata` is a pickle, and a pickle can run any code.

torch and Megatron read it with `pickle.load`. Here it is read with the few classes that an index is made of. Whoever hands
a checkpoint to Megatron asks `check_index` and `check_common` first. The objects inside the .distcp files are read by
torch's own planner with `weights_only=False`: `plain_values_only` forbids that for checkpoints that this run did not write.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

_DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "double",
    "float",
    "half",
    "complex32",
    "complex64",
    "complex128",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint16",
    "uint32",
    "uint64",
    "short",
    "int",
    "long",
    "bool",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
]
_KNOWN = frozenset(
    [("torch", name) for name in ["Size", "strided", *_DTYPES]]
    + [("torch.serialization", "_get_layout"), ("collections", "OrderedDict")]
    + [
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ]
    + [("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")]
    # Megatron keeps the plans of the save, too.
    + [
        ("torch.distributed.checkpoint.planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ]
    + [
        ("megatron.core.dist_checkpointing.strategies.torch", name)
        for name in ("MCoreMetadata", "MCoreSavePlan")
    ]
    # The folder that a checkpoint was saved to.
    + [("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")]
)
# What unpickling raises on bytes that are no pickle, or another one.
_UNREADABLE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class Refused(ValueError):
    """A pickle that asks for something that an index has no use for."""


class _Stand:
    """Takes the place of every class where an index is looked at without torch."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key, value):
        pass


class _StandInfo(_Stand):
    """Of torch's _StorageInfo: file, first byte, length."""

    relative_path: Any = None
    offset: Any = None
    length: Any = None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream, real: bool):
        super().__init__(stream)
        self._real, self.infos = real, []

    def find_class(self, module: str, name: str):
        if (module, name) not in _KNOWN:
            raise Refused(f"it asks for {module}.{name}, which no checkpoint's index needs")
        if self._real:
            return super().find_class(module, name)
        if name != "_StorageInfo":
            return _Stand
        infos = self.infos

        class Info(_StandInfo):
            def __new__(cls, *args, **kwargs):
                made = super().__new__(cls)
                infos.append(made)
                return made

        return Info

    def persistent_load(self, pid):
        raise Refused("it refers to something outside of itself")


def _unpickle(path: Path, real: bool) -> tuple[Any, list[_StandInfo]]:
    try:
        reader = _Unpickler(io.BytesIO(path.read_bytes()), real)
        return reader.load(), reader.infos
    except Refused as error:
        raise ValueError(f"{path} is not read: {error}. It could run code on this machine") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path} cannot be read, it is damaged: {type(error).__name__}: {error}") from None


def read_index(weights: Path) -> Any:
    """`.metadata` of a distributed checkpoint, as torch's (or Megatron's) Metadata.

    Raises:
        ValueError: when it is damaged, asks for any other class, or names a file outside of the folder.
    """
    metadata, _ = _unpickle(weights / ".metadata", real=True)
    try:
        where = [(i.relative_path, i.offset + i.length) for i in metadata.storage_data.values()]
        metadata.state_dict_metadata.items()
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{weights / '.metadata'} is no index of a checkpoint ({error})") from None
    _check_files(weights, where)
    return metadata


def check_index(weights: str | Path) -> None:
    """Look at a distributed checkpoint before Megatron loads it; torch is not imported.

    Raises:
        ValueError: when `.metadata` would run code, is damaged, or names a file outside of the folder.
    """
    weights = Path(weights)
    _, infos = _unpickle(weights / ".metadata", real=False)
    try:
        where = [(i.relative_path, i.offset + i.length) for i in infos]
    except TypeError as error:
        raise ValueError(f"{weights / '.metadata'} is no index of a checkpoint ({error})") from None
    _check_files(weights, where)


def check_common(weights: str | Path) -> None:
    """Read common.pt as Megatron will: tensors, plain values and Megatron's own few classes, whatever the environment allows.

    Raises:
        ValueError: when it is damaged or asks for anything else.
    """
    import megatron.core  # noqa: F401 - tells torch which of its classes are safe
    import torch

    path = Path(weights) / "common.pt"
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (*_UNREADABLE, OSError, RuntimeError) as error:
        asked = re.search(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)", str(error))
        why = f"it asks for {asked[1]}, which could run code" if asked else str(error).partition("\n")[0]
        raise ValueError(f"{path} is not read: {why}") from None


def check_format(weights: Path) -> None:
    """Refuse what is no torch_dist checkpoint.

    Raises:
        ValueError: naming the format that it has.
    """
    try:
        form = json.loads((weights / "metadata.json").read_text(encoding="utf-8"))
        backend = form.get("sharded_backend")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{weights} is no Megatron distributed checkpoint: {error}") from None
    if backend != "torch_dist":
        raise ValueError(f"{weights} is in the format {backend!r}; only torch_dist is supported")


def _check_files(weights: Path, where: list[tuple[str, int]]) -> None:
    """Every file that is read lies in the folder, and is as long as the index says."""
    ends: dict[str, int] = {}
    for name, end in where:
        if not isinstance(name, str) or not isinstance(end, int):
            raise ValueError(f"{weights / '.metadata'} is no index of a checkpoint: it names {name!r}")
        ends[name] = max(ends.get(name, 0), end)
    for name in ends:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\0" in name or "\\" in name:
            raise ValueError(f"{weights / '.metadata'} names {name!r}, which lies outside of the folder")
    real = weights.resolve()
    for path in [*(weights / name for name in ends), *_fixed(weights)]:
        if real not in path.resolve().parents:
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside of the folder; copy the folder with the files themselves (cp -rL)"
            )
    for name, end in ends.items():
        path = weights / name
        if not path.is_file() or path.stat().st_size < end:
            raise ValueError(f"{path} is missing or truncated; the index counts {end} bytes of it")


def _fixed(weights: Path) -> Iterator[Path]:
    for name in (".metadata", "metadata.json", "common.pt"):
        if os.path.lexists(weights / name):
            yield weights / name


_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def plain_values_only() -> Iterator[None]:
    """Inside the block every torch.load of this process takes tensors and plain values alone, whatever it or the user says.

    Byte buffers are allowed too: Transformer Engine keeps its extra state in them.
    """
    import torch

    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})
