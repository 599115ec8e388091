"""Whether a cache fits a model: the one place where that is decided, for caches from files and from Python alike.

Keys and values mean something to the model that made them alone. A cache therefore remembers its model (`remember`): what
its attention looks like, its rotary frequencies, and a digest of numbers taken from all of its weights, which takes
milliseconds. Where both know the fingerprint of the model's files, that decides.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.compat import rope_frequencies
from kvcat_nemo.compress.hf_attention import check_model

_SAMPLES = 16
"""Numbers taken of each weight, evenly spaced."""
_HALVES = ("bfloat16", "float16")
_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def know(model: PreTrainedModel, fingerprint: str, name: str) -> None:
    """Tell which files a model was loaded from: their fingerprint, and a name for messages."""
    _KNOWN[model] = {"model": fingerprint, "model_name": name}


def known_fingerprint(model: PreTrainedModel) -> str | None:
    """Fingerprint of the files that a model was loaded from; None where nobody told."""
    return _KNOWN.get(model, {}).get("model")


def remember(model: PreTrainedModel) -> dict[str, Any]:
    """Facts that a cache keeps of the model that made it; plain JSON."""
    made_by = {
        "rope": _rope(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _digest(model),
        "rounded": {name: _digest(model, getattr(torch, name)) for name in _HALVES},
    }
    return {**_KNOWN.get(model, {}), "made_by": made_by}


def check_fits(model: PreTrainedModel, cache: KVCache, rows: int | None = None) -> None:
    """Refuse a cache that another model made, or that does not go with the rows it is used with.

    Args:
        rows: rows that are to be fed after it; None: as many as it has.

    Raises:
        ValueError: says what differs.
    """
    check_model(model)
    config = model.config
    heads = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if len(cache.layers) != config.num_hidden_layers:
        raise _other(f"it has {len(cache.layers)} layers, the model {config.num_hidden_layers}")
    for number, layer in enumerate(cache.layers):
        keys, values, bias = _parts(layer)
        found = (layer.bias_BGS.shape[1], keys.shape[-1], values.shape[-1])
        if found != (heads, size, size):
            raise _other(
                f"layer {number} has {found[0]} KV heads of {found[1]} and {found[2]} numbers, the model {heads} of {size}"
            )
        if not (keys.is_floating_point() and values.is_floating_point()):
            raise ValueError(f"cache, layer {number}: keys of {keys.dtype}; must be floating-point numbers")
        if bias.shape[0] != cache.batch:
            raise ValueError(f"cache, layer {number}: {bias.shape[0]} rows, but lengths of {cache.batch}")
    if rows is not None and rows != cache.batch:
        raise ValueError(
            f"cache of {cache.batch} rows, but {rows} rows of tokens; give as many rows as it has"
        )
    device = model.get_input_embeddings().weight.device
    if cache.lengths_B.device.type != device.type:
        raise ValueError(
            f"cache on {cache.lengths_B.device}, the model on {device}; move it: cache.to({str(device)!r})"
        )
    _check_maker(model, cache.facts)


def _check_maker(model: PreTrainedModel, facts: dict[str, Any]) -> None:
    known, made_by = _KNOWN.get(model), facts.get("made_by")
    if known and facts.get("model") not in (None, known["model"]):
        raise _other(
            f"it was made by {facts.get('model_name')} ({facts['model'][:12]}…), not by {known['model_name']}"
            f" ({known['model'][:12]}…)"
        )
    if not isinstance(made_by, dict):
        return  # made by hand, or by a version that did not keep these: shapes alone can be compared
    mine = remember(model)["made_by"]
    if not _alike(made_by.get("rope"), mine["rope"], made_by.get("dtype"), mine["dtype"]):
        raise _other("its keys were turned by other rotary frequencies than the model's")
    pairs = []
    if made_by.get("dtype") == mine["dtype"]:
        pairs.append((made_by.get("weights"), mine["weights"]))
    rounded = made_by.get("rounded")
    if isinstance(rounded, dict):  # one of the two models may be the other one in 16 bits
        pairs += [(rounded.get(d), mine["rounded"].get(d)) for d in (made_by.get("dtype"), mine["dtype"])]
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
        raise _other("it was made by a model with other weights")


def _other(why: str) -> ValueError:
    return ValueError(f"cache: {why}: another model's cache means nothing to it; compress the text again")


def _parts(layer: LayerCache) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a layer (of a quantised one: its recent part, nothing is decoded), and its biases."""
    plain = getattr(layer, "recent", layer)
    return plain.keys_BGSD, plain.values_BGSE, layer.bias_BGS


def _rope(model: PreTrainedModel) -> list[float]:
    """Rotary frequencies for short texts (some kinds change them with the length), and the factor of their cosines."""
    frequencies, factor = rope_frequencies(model)
    return [*frequencies.detach().double().flatten().tolist(), factor]


def _alike(there: Any, now: list[float], dtype: Any, own_dtype: str) -> bool:
    """Equal but for rounding: a model that is turned to half precision as a whole has rounded frequencies."""
    bound = 2**-7 if {dtype, own_dtype} & {"bfloat16", "float16"} else 2**-20
    if not isinstance(there, list) or len(there) != len(now):
        return False
    return all(abs(a - b) <= bound * max(abs(a), abs(b)) for a, b in zip(there, now, strict=True))


@torch.no_grad()
def _digest(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str | None:
    """sha256 of numbers from every weight; None where weights are elsewhere (meta device).

    Args:
        dtype: round the numbers to it first: the digest of the same model in that dtype.

    Computed again at each call: weights may be trained in place without a trace.
    """
    head, taken = [], []
    for name, x in sorted(model.named_parameters()):
        if x.is_meta:
            return None
        head.append(f"{name.removeprefix('model.')} {tuple(x.shape)} {dtype or x.dtype}")
        if count := x.numel():
            number = min(count, _SAMPLES)
            places = [i * (count - 1) // max(number - 1, 1) for i in range(number)]
            part = x.detach().reshape(-1)[torch.tensor(places, device=x.device)]
            part = part if dtype is None else part.to(dtype)
            taken.append(part.contiguous().view(torch.uint8))
    digest = hashlib.sha256("\n".join(head).encode())
    if taken:
        first = taken[0].device
        digest.update(torch.cat([x.to(first) for x in taken]).cpu().numpy().tobytes())
    return digest.hexdigest()
