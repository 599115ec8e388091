"""Cache files: one safetensors file, without padding, read and written by the safetensors library.

The header holds the format and, as JSON, the facts of the cache and the kind of every layer. A layer's tensors are named
`<layer>.<name>`. A plain layer has `counts_BG` (int32), and its slots one behind the other, rows first, then heads:
`keys_PD`, `values_PE`, and `bias_P` where any slot has one. Each kind says itself what it writes (`pack`, `unpack`).

Shapes: B rows, G KV heads, S slots (padded), P slots there are, over all rows and heads; D and E head dims.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcat_nemo.common.files import new_file
from kvcat_nemo.compress.layers import LayerCache
from kvcat_nemo.compress.packing import expect
from kvcat_nemo.compress.quantised import QuantisedLayer

FORMAT = "kvcat-kv-cache-1"
KINDS: dict[str, type[LayerCache]] = {kind.kind: kind for kind in (LayerCache, QuantisedLayer)}
"""Kinds of layers by the name that files give them."""

Contents = tuple[list[LayerCache], Tensor, dict[str, Any]]
"""A cache's layers, lengths_B and facts."""


def write(path: str | Path, layers: list[LayerCache], lengths_B: Tensor, facts: dict[str, Any]) -> None:
    """Write a cache; a crash leaves either the old file or the new one.

    Raises:
        ValueError: when the facts are not plain JSON, the folder is not there, or the file is somebody else's.
    """
    path = Path(path)
    check_target(path)
    kinds, tensors = [], {"lengths_B": lengths_B}
    for number, layer in enumerate(layers):
        kinds.append({"kind": layer.kind, **layer.settings})
        tensors |= {f"{number}.{name}": x for name, x in layer.pack().items()}
    try:
        description = json.dumps({"layers": kinds, "facts": facts})
    except TypeError as error:
        raise ValueError(
            f"facts of the cache: {error}; they must be plain JSON to be kept in a file"
        ) from None
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    with new_file(path) as temporary:
        save_file(tensors, temporary, {"format": FORMAT, "cache": description})


def check_target(path: str | Path) -> None:
    """Refuse a file that a cache must not be written to: only a cache of ours is replaced.

    Raises:
        ValueError: when its folder is not there, or it holds anything else.
    """
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist; make it first")
    if not os.path.lexists(path):
        return
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is no plain file")
        with safe_open(path, framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(f"{path} exists and is no KV cache of kvcat; it is not replaced: give another file")


def read(path: str | Path, *, device: str | torch.device = "cpu") -> Contents:
    """Read what `write` wrote.

    Raises:
        ValueError: names the file when it is missing, cut off, damaged, or no cache of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `kvcat compress` writes one")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                found = header.get("format", "none")
                raise ValueError(
                    f"{path}: not a KV cache in the format {FORMAT} (its format: {found}); `kvcat compress` writes one"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, RecursionError) as error:
        raise ValueError(
            f"{path}: cut off, damaged, or no safetensors file ({error}); compress the text again"
        ) from error
    try:
        description = json.loads(header["cache"])
        return _contents(description, tensors)
    except (KeyError, TypeError, IndexError, RuntimeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: damaged cache file ({error!r}); compress the text again") from error


def _contents(description: Any, tensors: dict[str, Tensor]) -> Contents:
    lengths, kinds, facts = tensors["lengths_B"], description["layers"], description["facts"]
    if not isinstance(kinds, list) or not kinds or not isinstance(facts, dict):
        raise RuntimeError("its description holds no list of layers with facts")
    numbers = {name.partition(".")[0] for name in tensors if name != "lengths_B"}
    if numbers != {str(number) for number in range(len(kinds))}:
        raise RuntimeError(f"{len(kinds)} layers described, {len(numbers)} there")
    expect(lengths, "lengths_B", 1, whole=True)
    if not len(lengths) or int(lengths.min()) < 1:
        raise RuntimeError(f"lengths_B = {lengths.tolist()[:4]}: rows of at least one token wanted")
    for name, x in tensors.items():
        if "counts_" in name and x.shape[:1] != lengths.shape:
            raise RuntimeError(f"{name} is of shape {tuple(x.shape)}, lengths_B of {len(lengths)} rows")
    layers = [_layer(kind, number, tensors) for number, kind in enumerate(kinds)]
    return layers, lengths, facts


def _layer(kind: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> LayerCache:
    if not isinstance(kind, dict):
        raise TypeError(f"layer {number} is described by {type(kind).__name__}")
    prefix = f"{number}."
    mine = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    settings = {key: value for key, value in kind.items() if key != "kind"}
    if kind["kind"] not in KINDS:
        raise KeyError(f"layers of kind {kind['kind']!r}")
    return KINDS[kind["kind"]].unpack(mine, **settings)
