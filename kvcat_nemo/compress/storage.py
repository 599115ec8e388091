"""Compressed caches on disk: one safetensors file, without padding.

The header holds the format and, as JSON, the facts of the cache and the kind of every layer. A layer's tensors are named
`<layer>.<name>`. A plain layer has `counts_BG` (int32), and its slots one behind the other, rows first, then heads:
`keys_PD`, `values_PE`, and `bias_P` where any slot has one. Other kinds say what they write themselves (`pack`, `unpack`).

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
from kvcat_nemo.compress.cache import FORMAT, KVCache, LayerCache

PLAIN, QUANTISED = "plain", "quantised"


def save(cache: KVCache, path: str | Path) -> None:
    """Write a cache; a crash leaves either the old file or the new one.

    Raises:
        ValueError: when the facts are not plain JSON, the folder is not there, or the file is somebody else's.
    """
    path = Path(path)
    check_target(path)
    kinds, tensors = [], {"lengths_B": cache.lengths_B}
    for number, layer in enumerate(cache.layers):
        kind = _kind(layer)
        kinds.append({"kind": kind, **_settings(layer)})
        tensors |= {f"{number}.{name}": x for name, x in _module(kind).pack(layer).items()}
    try:
        description = json.dumps({"layers": kinds, "facts": cache.facts})
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


def load(path: str | Path, *, device: str | torch.device = "cpu") -> KVCache:
    """Read what `save` wrote.

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
        return _cache(description, tensors)
    except (KeyError, TypeError, IndexError, RuntimeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: damaged cache file ({error!r}); compress the text again") from error


def pack(layer: LayerCache) -> dict[str, Tensor]:
    """The slots of a plain layer, without padding."""
    present = layer.present_BGS
    packed = {
        "counts_BG": layer.slots_BG.int(),
        "keys_PD": layer.keys_BGSD[present],
        "values_PE": layer.values_BGSE[present],
    }
    if layer.has_bias:
        packed["bias_P"] = layer.bias_BGS[present]
    return packed


def _cache(description: Any, tensors: dict[str, Tensor]) -> KVCache:
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
    return KVCache(layers, lengths, facts)


def expect(x: Tensor, name: str, dims: int, *, whole: bool = False, entries: int | None = None) -> None:
    """Check what a file says of a tensor before anything is made of it.

    Args:
        dims: how many dimensions; all but the first must hold something.
        whole: integers, else floating-point numbers; entries: size of the first dimension, None for any.

    Raises:
        RuntimeError: it is otherwise.
    """
    if x.dim() != dims or 0 in x.shape[1:]:
        raise RuntimeError(f"{name} is of shape {tuple(x.shape)}, {dims} dimensions wanted")
    if x.is_floating_point() == whole or x.dtype == torch.bool or x.is_complex():
        raise RuntimeError(f"{name} is of {x.dtype}")
    if entries is not None and len(x) != entries:
        raise RuntimeError(f"{name}: {len(x)} entries for {entries} places")


def check_memory(wanted: int, name: str) -> None:
    """Refuse what this machine's memory could not hold."""
    if wanted > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise RuntimeError(f"{name}: {wanted:,} bytes when padded, the machine has {memory:,}")


def check_counts(counts: Tensor, entries: int, name: str, *, most: int) -> None:
    """Check counts that a file holds against what else it holds, before they decide how much memory is asked for.

    Args:
        counts: how many entries each place has; entries: how many there are in all.
        most: entries that a place can have.

    Raises:
        RuntimeError: the counts are not those of the entries.
    """
    expect(counts, name, counts.dim(), whole=True)
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > most):
        raise RuntimeError(f"{name}: from {int(counts.min())} to {int(counts.max())}, 0 to {most} possible")
    total = int(counts.long().sum())  # each at most `most`: no overflow
    if total != entries:
        raise RuntimeError(f"{entries} entries for {total} places")


def unpack(packed: dict[str, Tensor]) -> LayerCache:
    """The layer again, padded behind each head's slots."""
    counts, keys, values = packed["counts_BG"], packed["keys_PD"], packed["values_PE"]
    expect(counts, "counts_BG", 2, whole=True)
    expect(keys, "keys_PD", 2)
    check_counts(counts, len(keys), "counts_BG", most=len(keys))
    expect(values, "values_PE", 2, entries=len(keys))
    bias = packed.get("bias_P")
    if bias is not None:
        expect(bias, "bias_P", 1, entries=len(keys))
    entry = (
        keys.shape[1] * keys.element_size() + values.shape[1] * values.element_size() + 5
    )  # bias, presence
    check_memory(counts.numel() * int(counts.max()) * entry, "counts_BG")
    counts = counts.long()
    present = torch.arange(int(counts.max()), device=counts.device) < counts[..., None]
    bias = torch.zeros(len(keys), device=counts.device) if bias is None else bias
    return LayerCache(
        spread(packed["keys_PD"], present),
        spread(packed["values_PE"], present),
        spread(bias, present, empty=-torch.inf),
    )


def spread(packed_Px: Tensor, present: Tensor, *, empty: float = 0) -> Tensor:
    """Packed entries at the places where `present` is true, in its order; `empty` elsewhere."""
    if len(packed_Px) != int(present.sum()):
        raise RuntimeError(f"{len(packed_Px)} entries for {int(present.sum())} places")
    out = packed_Px.new_full((*present.shape, *packed_Px.shape[1:]), empty)
    out[present] = packed_Px
    return out


def _kind(layer: LayerCache) -> str:
    return PLAIN if type(layer) is LayerCache else QUANTISED


def _settings(layer: LayerCache) -> dict[str, Any]:
    return {} if type(layer) is LayerCache else layer.settings


def _module(kind: str):
    if kind == PLAIN:
        from kvcat_nemo.compress import storage as module
    elif kind == QUANTISED:
        from kvcat_nemo.compress import quantised as module
    else:
        raise KeyError(f"layers of kind {kind!r}")
    return module


def _layer(kind: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> LayerCache:
    if not isinstance(kind, dict):
        raise TypeError(f"layer {number} is described by {type(kind).__name__}")
    prefix = f"{number}."
    mine = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    settings = {key: value for key, value in kind.items() if key != "kind"}
    return _module(kind["kind"]).unpack(mine, **settings)
