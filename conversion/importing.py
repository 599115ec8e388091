"""Hugging Face → Megatron: one pass over the tensors, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from kvcat_nemo.conversion.arch import Architecture, from_hf_config
from kvcat_nemo.conversion.dist_checkpoint import CheckpointWriter
from kvcat_nemo.conversion.folders import check_out, copy_sidecars, published, require_space
from kvcat_nemo.conversion.safetensors_io import SafetensorsFolder, find_not_finite
from kvcat_nemo.conversion.weight_map import (
    EXTRA_STATE_LAYERED,
    EXTRA_STATE_SINGLE,
    Weight,
    hf_shapes,
    instances,
    to_groups,
    weight_map,
)
from kvcat_nemo.models.hf_config import read_config
from kvcat_nemo.models.hub import model_folder, own_name, pinned
from kvcat_nemo.models.weights import EMBEDDING, IGNORED, OUTPUT, check_tied
from kvcat_nemo.runs.integrity import require_unchanged
from kvcat_nemo.runs.layout import CARD, WEIGHTS

FORMAT_VERSION = 1
DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16}

# Plain Megatron asks for the bare names, NeMo for the same ones behind "module."; both point to the same bytes.
KEY_PREFIXES = ("", "module.")


def import_hf(hf_dir: str | Path, out: str | Path, *, dtype: str = "keep", force: bool = False) -> Path:
    """Convert a Hugging Face folder into `out`: weights/ (Megatron), hf/ (config, tokenizer), kvcat_checkpoint.json.

    Args:
        hf_dir: a Hugging Face folder or a hub id (kvcat_nemo.models.hub); the card then records owner/name@commit.
        dtype: "keep", "float32" or "bfloat16".
        force: replace `out` if it is a folder that kvcat wrote, and holds nothing else.

    Returns:
        `out`, which exists only when the conversion was complete.

    Raises:
        ValueError: for anything that could not be carried over faithfully; names the tensor or field.
    """
    hf_dir, out = model_folder(hf_dir), Path(out)
    check_out(out, force=force, sources=[hf_dir])
    require_unchanged(hf_dir)
    arch = from_hf_config(read_config(hf_dir))
    source = SafetensorsFolder(hf_dir)
    check_source(source, arch)
    target = DTYPES[dtype]
    _check_dtypes(source, arch, target)
    facts = {"vocab_size": arch.vocab_size, "padded_vocab_size": arch.vocab_size}
    with published(out, force=force, sources=[hf_dir], kind="import", **facts) as partial:
        size = sum(
            (target or s.dtype).itemsize * s.nbytes // s.dtype.itemsize for s in source.tensors.values()
        )
        require_space(partial, size)
        copy_sidecars(hf_dir, partial / "hf")
        (partial / WEIGHTS).mkdir()
        fingerprint = _write_weights(source, arch, partial / WEIGHTS, target)
        card = {
            "format": "kvcat-checkpoint",
            "format_version": FORMAT_VERSION,
            "architecture": asdict(arch),
            "source": {"name": own_name(hf_dir), "fingerprint": fingerprint}
            | ({"hub": hub} if (hub := pinned(hf_dir)) else {}),
            "dtype": dtype if target else str(source.tensors[EMBEDDING].dtype).removeprefix("torch."),
            "versions": {"python": sys.version.split()[0]}
            | {name: importlib.metadata.version(name) for name in ("kvcat-nemo", "torch", "megatron-core")},
        }
        (partial / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return out


def check_source(source: SafetensorsFolder, arch: Architecture) -> None:
    """Refuse a folder whose tensors are not exactly those of `arch`.

    Raises:
        ValueError: names the missing, extra or misshapen tensors, or an output layer that a tied config denies.
    """
    expected = hf_shapes(arch)
    names = {name for name in source.tensors if not IGNORED.fullmatch(name)}
    missing, extra = sorted(expected.keys() - names), sorted(names - expected.keys())
    check_tied(source.folder, source.weights, arch.tied)
    if arch.tied and OUTPUT in extra:
        extra.remove(OUTPUT)
    for kind, found in (("lacks", missing), ("has unknown", extra)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(f"{source.folder} {kind} tensors: {', '.join(found[:3])}{more}")
    for name, shape in expected.items():
        if source.tensors[name].shape != shape:
            raise ValueError(
                f"{source.folder}: {name} has shape {list(source.tensors[name].shape)}, config.json asks for "
                f"{list(shape)}"
            )


def _check_dtypes(source: SafetensorsFolder, arch: Architecture, target: torch.dtype | None) -> None:
    if target is not None:
        return
    for weight in weight_map(arch):
        names = [
            n for layer in range(arch.num_layers if weight.layered else 1) for n in weight.hf_names(layer)
        ]
        found = {source.tensors[name].dtype for name in names}
        if len(found) > 1:
            raise ValueError(
                f"{source.folder}: {', '.join(weight.hf)} mix {', '.join(sorted(map(str, found)))}, but Megatron "
                f"keeps them as one tensor; choose one with --dtype float32 or --dtype bfloat16"
            )


def _write_weights(
    source: SafetensorsFolder, arch: Architecture, folder: Path, dtype: torch.dtype | None
) -> str:
    digests: dict[str, str] = {}

    def read(name: str) -> torch.Tensor:
        tensor = source.read(name)
        kind = find_not_finite(tensor)
        if kind:
            raise ValueError(f"{source.folder}: {name} holds {kind}; the checkpoint is damaged")
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode(), digest_size=16)
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
        digests[name] = digest.hexdigest()
        tensor = tensor if dtype is None else tensor.to(dtype)
        if dtype is not None and find_not_finite(tensor):
            raise ValueError(f"{source.folder}: {name} overflows in {dtype}; keep its dtype")
        return tensor

    writer = CheckpointWriter(folder, KEY_PREFIXES)
    for weight, layer in tqdm(list(instances(arch)), desc="HF → Megatron", unit="tensor", disable=None):
        for row, chunk in _chunks(weight, layer, arch, read):
            shape, offsets = weight.shape(arch), (row,) + (0,) * (chunk.ndim - 1)
            if weight.layered:
                shape, offsets, chunk = (arch.num_layers, *shape), (layer, *offsets), chunk[None]
            writer.add_tensor(weight.megatron, chunk, shape, offsets)
            del chunk
    for key in EXTRA_STATE_LAYERED:
        for layer in range(arch.num_layers):
            writer.add_empty_object(key, layer, arch.num_layers)
    for key in EXTRA_STATE_SINGLE:
        writer.add_empty_object(key, 0, 1)
    writer.close()
    return hashlib.blake2b(json.dumps(sorted(digests.items())).encode(), digest_size=16).hexdigest()


def _chunks(weight: Weight, layer: int, arch: Architecture, read) -> Iterable[tuple[int, torch.Tensor]]:
    """(first row, chunk) of one layer's tensor; gate and up stay two chunks, as Megatron writes them."""
    names = weight.hf_names(layer)
    if weight.layout == "groups":
        yield 0, to_groups(lambda part: read(names[part]), arch)
        return
    row = 0
    for name, shape in zip(names, weight.hf_shapes(arch), strict=True):
        yield row, read(name)
        row += shape[0]
