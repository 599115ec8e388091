"""Which safetensors files belong to a Hugging Face model, and whether they are whole.

The safetensors library checks the files. Tensors are then read as plain files, not mapped: mapped pages count as the process'
memory.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.models.hf_config import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OUTPUT, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Buffers that old Llama checkpoints carry and every loader recomputes."""

_MODEL_FILE = re.compile(r"model[-._].*|model|.*-\d+-of-\d+")
_PIECE = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """safetensors' name, such as BF16."""
    shape: tuple[int, ...]
    start: int
    """First byte, from the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class ModelWeights:
    """The weight files of a model folder, every one of them whole, and nothing that another reader would take instead."""

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    """By name, buffers that every loader recomputes included."""


def find_weights(folder: str | Path) -> ModelWeights:
    """The weights of a Hugging Face folder: model.safetensors, or the shards that its index names.

    Raises:
        ValueError: when files are missing, damaged or pickled, when the index and the shards disagree, or when another
            file lies there that a loader could take for the model's.
    """
    folder = Path(folder)
    index = _read_index(folder) if (folder / INDEX).is_file() else None
    names = sorted(set(index.values())) if index is not None else [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and index is not None:
        raise ValueError(
            f"{folder} lacks {', '.join(missing[:3])}, which {INDEX} names; fetch or export it again"
        )
    if missing:
        _refuse_without(folder)
    _refuse_others(folder, names, index is not None)
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        found = read_header(folder / name)
        twice = tensors.keys() & found.keys()
        if twice:
            raise ValueError(f"{folder}: {sorted(twice)[0]} is in two shards; fetch or export it again")
        tensors |= found
    if index is not None:
        wrong = [n for n, f in index.items() if n not in tensors or tensors[n].file.name != f]
        wrong += [n for n in tensors if n not in index]
        if wrong:
            raise ValueError(
                f"{folder}: {INDEX} and the shards disagree on {wrong[0]}; fetch or export it again"
            )
    return ModelWeights(tuple(folder / name for name in names), tensors)


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    content = read_json(path)
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise ValueError(f"{path}: weight_map must name the file of every tensor; fetch or export it again")
    for tensor, file in found.items():
        if not file or file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: {tensor} = {file!r}: a shard must be a safetensors file in the model's own folder; "
                "fetch or export the model again"
            )
    return found


def index_files(folder: Path) -> set[str]:
    """The shards that a folder's index names.

    Raises:
        ValueError: an index that is damaged, or names anything but safetensors files in its own folder.
    """
    return set(_read_index(folder).values())


def _refuse_without(folder: Path) -> None:
    pickled = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise ValueError(
            f"{folder}: {SINGLE} is missing; the folder holds pickled weights ({', '.join(pickled[:3])}), which can run "
            "code when loaded: convert them to safetensors first"
        )
    raise ValueError(f"{folder}: {SINGLE} is missing (and {INDEX} too); fetch or export it again")


def _refuse_others(folder: Path, names: list[str], indexed: bool) -> None:
    for path in sorted(folder.glob("*")):
        if path.name.startswith("adapter_model.") or path.name == "adapter_config.json":
            raise ValueError(
                f"{folder}: {path.name} is an adapter, which transformers puts onto the model where peft is installed; "
                "merge it into the model, or move it away"
            )
        if path.name in names or path.suffix != ".safetensors" or not _MODEL_FILE.fullmatch(path.stem):
            continue
        if path.name == SINGLE:
            raise ValueError(
                f"{folder}: {SINGLE} stands beside {INDEX}, which does not name it: some readers take the file, others "
                "the shards; move away the one that is not the model"
            )
        where = f"{INDEX} does not name it" if indexed else f"no {INDEX} names it"
        raise ValueError(
            f"{folder}: {path.name} looks like a part of the model, but {where}; move it away, or fetch the model again"
        )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, whose header and length the safetensors library has checked.

    Raises:
        ValueError: when it is no safetensors file, or is not whole.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(
            file, framework="numpy"
        ):  # each tensor's offsets and shape, and that they cover the whole file
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is truncated, damaged, or not a safetensors file ({error}); fetch or export it again"
        ) from None
    with file.open("rb") as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(data - 8))
    header.pop("__metadata__", None)
    return {name: _stored(file, data, **entry) for name, entry in header.items()}


def _stored(
    file: Path, data: int, dtype: str, shape: list[int], data_offsets: list[int], **_: Any
) -> StoredTensor:
    start, end = data_offsets
    return StoredTensor(file, dtype, tuple(shape), data + start, end - start)


def check_tied(folder: str | Path, weights: ModelWeights, tied: bool) -> None:
    """Refuse an output layer that contradicts tie_word_embeddings.

    transformers 4 ties such a pair, with either of the two weights; transformers 5 leaves it untied.

    Raises:
        ValueError: when a tied model stores another output layer, or an untied one stores none.
    """
    output, embedding = (weights.tensors.get(name) for name in (OUTPUT, EMBEDDING))
    if tied and output and embedding and not _same_bytes(output, embedding):
        raise ValueError(
            f"{folder}: tie_word_embeddings is true, but {OUTPUT} differs from {EMBEDDING}; "
            f"set tie_word_embeddings to false in config.json if the output layer is meant to be separate"
        )
    if not tied and embedding and not output:
        raise ValueError(
            f"{folder}: {OUTPUT} is missing although tie_word_embeddings is false; set it to true in config.json if the "
            "model shares the embedding"
        )


def _same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    with left.file.open("rb") as a, right.file.open("rb") as b:
        a.seek(left.start)
        b.seek(right.start)
        for done in range(0, left.nbytes, _PIECE):
            size = min(_PIECE, left.nbytes - done)
            if a.read(size) != b.read(size):
                return False
    return True
