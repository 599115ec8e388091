"""Sizes that come from outside, from a configuration, a file's header or a command line: bounds, each with its reason.

A size sets a loop's count or an allocation. One that is absurd (10**30 layers, a billion workers) would be obeyed for hours
or until memory ends; it is refused here, before anything is built. The bounds are far beyond what anyone trains, so that
they stop mistakes alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """The values that a size may have, both ends included."""

    low: int
    high: int
    why: str


LIMITS: dict[str, Limit] = {
    "layers": Limit(
        1, 10_000, "a layer is a module in memory; the deepest published decoders have under 200"
    ),
    "width": Limit(1, 1 << 20, "a matrix of width × width in float32 takes 4 TiB there"),
    "ffn_width": Limit(1, 1 << 22, "a matrix as wide takes as much"),
    "heads": Limit(1, 1 << 16, "a head has a channel at least, and widths end at 2^20"),
    "head_dim": Limit(
        1, 1 << 14, "kernels hold a head's channels in registers; published heads have at most 512"
    ),
    "vocabulary": Limit(1, 1 << 24, "published vocabularies have under 300 thousand tokens"),
    "positions": Limit(1, 1 << 30, "a window of 2^30 tokens takes 8 GiB as numbers alone"),
    "batch": Limit(1, 1 << 24, "windows of a step; the order of windows is held in memory"),
    "steps": Limit(1, 10**9, "a thousand steps a second would take twelve days"),
    "val_batches": Limit(0, 10**6, "every validation reads as many batches"),
    "workers": Limit(0, 4096, "each is a process, or a thread"),
    "groups": Limit(1, 10_000, "there are no more groups than layers"),
    "ranks": Limit(1, 1 << 20, "a rank is a process"),
    "nodes": Limit(1, 1 << 17, "a node has a host name of its own"),
    "seed": Limit(0, (1 << 32) - 1, "NumPy's generators take 32 bits"),
    "torch_seed": Limit(0, (1 << 63) - 1, "PyTorch's generators take 63 bits"),
    "tokens": Limit(1, 1 << 30, "tokens are held in memory, 8 bytes each"),
    "windows": Limit(1, 10**7, "each is measured"),
    "items": Limit(1, 10**8, "each is read"),
}
MAX_PARAMETERS = 10**14
"""Of a model: a hundred times the largest published; in bf16 they take 200 TB."""


def integer(value: Any) -> int | None:
    """An integer, also one as text or as a whole float, as command lines and other programs' files give them; else None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    if isinstance(value, str) and len(value) <= 40 and value.strip().lstrip("+-").isdecimal():
        return int(value)
    return None


def check_size(name: str, value: Any, kind: str) -> int:
    """`value` as an integer within LIMITS[kind].

    Args:
        name: as the user knows it, such as data.seq_length.

    Raises:
        ValueError: naming the field, the value, the bounds and their reason.
    """
    limit, number = LIMITS[kind], integer(value)
    if number is None:
        raise ValueError(f"{name}={_short(value)}: not an integer; give {limit.low:,} to {limit.high:,}")
    if number < limit.low:
        raise ValueError(f"{name}={_short(value)}: give at least {limit.low:,}")
    if number > limit.high:
        raise ValueError(
            f"{name}={_short(value)}: at most {limit.high:,} are supported ({limit.why}); correct it"
        )
    return number


def _short(value: Any) -> str:
    text = (
        repr(value)
        if not isinstance(value, int) or value.bit_length() < 512
        else f"a number of {value.bit_length()} bits"
    )
    return text if len(text) <= 80 else text[:77] + "…"


# Of a Hugging Face config.json.
_CONFIG_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "intermediate_size": "ffn_width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "head_dim": "head_dim",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
}


def check_config_sizes(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Refuse a Hugging Face configuration whose sizes are no sizes, before anything loops over them or is allocated.

    Args:
        config: the file's content; fields that are missing or null are left to the reader.
        where: the file, for messages.

    Raises:
        ValueError: naming the field, its value and the bound.
    """
    sizes = {}
    for field, kind in _CONFIG_SIZES.items():
        value = config.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{where}: {field}={_short(value)}: not an integer; correct the file")
        sizes[field] = check_size(f"{where}: {field}", value, kind)
    layers, hidden, ffn, vocabulary = (
        sizes.get(f, 1) for f in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    )
    heads = sizes.get("num_attention_heads", 1) * sizes.get("head_dim", 1)
    parameters = layers * hidden * (3 * ffn + 2 * heads) + vocabulary * hidden
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"{where}: num_hidden_layers={layers}, hidden_size={hidden}, intermediate_size={ffn}, vocab_size={vocabulary}: "
            f"a model of some {parameters:.1e} parameters; at most {MAX_PARAMETERS:.0e} are supported. Correct the file"
        )
    for field in ("layer_types",):
        value = config.get(field)
        if isinstance(value, list) and len(value) != layers:
            raise ValueError(
                f"{where}: {field} names {len(value):,} layers, num_hidden_layers is {layers}; correct the file"
            )


# Settings and options by their plain names → their kind; one that is not named here is a number of items.
_KINDS = {
    "batch_size": "batch",
    "continuation": "positions",
    "count": "windows",
    "cpus_per_node": "workers",
    "gpus_per_node": "workers",
    "keep_tokens": "positions",
    "length": "positions",
    "lengths": "positions",
    "lesson_tokens": "positions",
    "max_tokens": "positions",
    "node_rank": "nodes",
    "nodes": "nodes",
    "pp": "ranks",
    "prefix": "positions",
    "procs_per_node": "workers",
    "samples": "windows",
    "seed": "torch_seed",
    "split_seed": "torch_seed",
    "steps": "steps",
    "threads": "workers",
    "tokens": "positions",
    "tp": "ranks",
    "windows": "windows",
    "workers": "workers",
}


def check_upper(name: str, value: Any, shown: str | None = None) -> None:
    """Refuse a number that no run could work off, of an option or a setting of that plain name (what is too small, and what
    is no number, the setting's own check says).

    Args:
        name: without dashes and dots, such as batch_size; shown: as the user wrote it.

    Raises:
        ValueError: naming the setting, the value, the bound and its reason.
    """
    shown = shown or name
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"{shown}={one}: give a finite number")
        number = integer(one)
        if isinstance(one, float) and name not in _KINDS:
            continue  # a measure, not a count: nothing loops over it
        kind = _KINDS.get(name, "items")
        if number is not None and abs(number) > LIMITS[kind].high:
            raise ValueError(
                f"{shown}={_short(one)}: at most {LIMITS[kind].high:,} are supported ({LIMITS[kind].why}); correct it"
            )


# Of a model configuration of Megatron or NeMo.
_MODEL_SIZES = {
    "num_layers": "layers",
    "hidden_size": "width",
    "ffn_hidden_size": "ffn_width",
    "num_attention_heads": "heads",
    "num_query_groups": "heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocabulary",
    "true_vocab_size": "vocabulary",
    "make_vocab_size_divisible_by": "vocabulary",
    "seq_length": "positions",
    "tensor_model_parallel_size": "ranks",
    "pipeline_model_parallel_size": "ranks",
    "virtual_pipeline_model_parallel_size": "layers",
    "context_parallel_size": "ranks",
    "expert_model_parallel_size": "ranks",
    "microbatch_group_size_per_vp_stage": "batch",
}
_METHOD_SIZES = {
    "num_groups": "groups",
    "router_dim": "width",
    "sinks": "positions",
    "recent_window": "positions",
    "loss_memory_mib": "tokens",
    "seed": "torch_seed",
}


def check_model_sizes(config: Any, where: str = "model.config") -> None:
    """Refuse a model configuration whose sizes are no sizes, before a loop over them or an allocation.

    Args:
        config: any object with some of Megatron's fields (None: the field is not set), and maybe `kvcat`.

    Raises:
        ValueError: naming the field, its value, the bound and its reason.
    """
    for name, kind in _MODEL_SIZES.items():
        value = getattr(config, name, None)
        if value is not None:
            check_size(f"{where}.{name}", value, kind)
    for name in _METHOD_SIZES:
        value = getattr(getattr(config, "kvcat", None), name, None)
        if isinstance(value, int) and value > LIMITS[_METHOD_SIZES[name]].high:
            check_size(f"{where}.kvcat.{name}", value, _METHOD_SIZES[name])


def check_config_fits_weights(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str = "config.json"
) -> None:
    """Compare a configuration's sizes with the weights' shapes, before a model of those sizes is built.

    Args:
        shapes: tensor name → shape, from the headers of the safetensors files.

    Raises:
        ValueError: naming the field, its value and what the weights have.
    """
    layers = {
        int(part[2])
        for name in shapes
        if len(part := name.split(".")) > 2 and part[1] == "layers" and part[2].isdecimal()
    }
    found = {"num_hidden_layers": len(layers)} if layers else {}
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding and len(embedding) == 2:
        found |= {"vocab_size": embedding[0], "hidden_size": embedding[1]}
    gate = shapes.get("model.layers.0.mlp.gate_proj.weight")
    if gate and len(gate) == 2:
        found["intermediate_size"] = gate[0]
    for field, value in found.items():
        if config.get(field) is not None and config[field] != value:
            raise ValueError(
                f"{where}: {field}={_short(config[field])}, but the weights have {value:,}; one of the two files is of another model"
            )
