"""The model families: what transformers' class of a model_type takes for granted, the same in 4.57 and 5.2.

A family is one entry of FAMILIES. Everything that knows families reads it there: loading, compression, conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvcat_nemo.models.config_values import flag, refuse, whole


@dataclass(frozen=True)
class Family:
    """What transformers' class of a model_type takes for granted."""

    architecture: str
    kv_heads: int | None = None
    """num_key_value_heads where the field is missing; None: as many as query heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    window: int | None = None
    """sliding_window where the field is missing."""
    qkv_bias: bool | None = None
    """None: attention_bias says it, of all four projections."""
    mlp_bias: bool = False
    """Whether the field mlp_bias is read."""
    qk_norm: bool = False
    windows: str = "none"
    """Which layers a sliding window holds for: "none" (the class knows none), "all" of them, or "some" (layer_types or
    max_window_layers says which)."""
    megatron: bool = True
    """Whether `kvcat convert` carries the family to Megatron."""


FAMILIES = {
    "llama": Family("LlamaForCausalLM", mlp_bias=True),
    "qwen2": Family("Qwen2ForCausalLM", kv_heads=32, qkv_bias=True, windows="some"),
    "qwen3": Family("Qwen3ForCausalLM", kv_heads=32, head_dim=128, qk_norm=True, windows="some"),
    "mistral": Family(
        "MistralForCausalLM", kv_heads=8, window=4096, qkv_bias=False, windows="all", megatron=False
    ),
}


def kv_heads(config: Mapping, family: Family, name: str, heads: int, where: str) -> int:
    """num_key_value_heads of a configuration.

    Raises:
        ValueError: when the field is missing and the class would not take as many as query heads.
    """
    if config.get("num_key_value_heads") is not None:
        return whole(where, "num_key_value_heads", config["num_key_value_heads"])
    if "num_key_value_heads" in config or family.kv_heads in (None, heads):
        return heads
    raise ValueError(
        f"{where}: num_key_value_heads is missing: transformers takes {family.kv_heads} for {name} whatever "
        f"num_attention_heads is; add it"
    )


def windows(config: Mapping, family: Family, layers: int, where: str) -> tuple[int | None, ...]:
    """Per layer: tokens that it attends to at most; None for all.

    Raises:
        ValueError: when the fields contradict each other, or the class would not do what they say.
    """

    def window(default: int | None) -> int | None:
        value = config.get("sliding_window", default)
        return None if value is None else whole(where, "sliding_window", value)

    kinds = config.get("layer_types")
    if kinds is not None:
        known = {"full_attention", "sliding_attention"}
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            refuse(where, "layer_types", kinds, "it must be a list of names", "mend it, or remove it")
        if len(kinds) != layers or not set(kinds) <= known:
            strange = sorted(set(kinds) - known)
            refuse(
                where,
                "layer_types",
                strange or f"{len(kinds)} entries",
                f"it must name full_attention or sliding_attention for each of {layers} layers",
                "mend it",
            )
    if family.windows != "some":
        one = window(family.window)
        if family.windows == "none" and one is not None:
            refuse(
                where,
                "sliding_window",
                one,
                f"{family.architecture} attends to the whole text, but transformers' cache would forget it",
                "remove it",
            )
        if config.get("use_sliding_window"):
            refuse(where, "use_sliding_window", True, f"{family.architecture} does not read it", "remove it")
        if kinds is not None and set(kinds) != {"sliding_attention" if one else "full_attention"}:
            refuse(
                where,
                "layer_types",
                sorted(set(kinds)),
                f"{family.architecture} has one kind of layer, and sliding_window is {one!r}",
                "remove layer_types",
            )
        return (one,) * layers
    one = window(4096) if flag(where, "use_sliding_window", config.get("use_sliding_window")) else None
    if kinds is None:
        first = config.get("max_window_layers", 28)
        if one is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 0):
            refuse(where, "max_window_layers", first, "it must be a whole number from 0", "mend it")
        return tuple(one if one is not None and layer >= first else None for layer in range(layers))
    if "sliding_attention" in kinds and one is None:
        refuse(
            where,
            "layer_types",
            ["sliding_attention"],
            "use_sliding_window or sliding_window says that there is no window",
            "make the fields agree",
        )
    return tuple(one if kind == "sliding_attention" else None for kind in kinds)
