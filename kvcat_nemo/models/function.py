"""What a model computes, whichever library runs it: one set of names, read from config.json, from Megatron's settings, from a
run's record, and compared.

Names are those of Megatron's and NeMo's configuration fields. Only what changes the function is here: layouts, precision,
kernels, dropout and the start of training are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvcat_nemo.models.hf_config import ModelConfig, parse_config, read_config, read_json
from kvcat_nemo.models.rope import Rope, RopeScaling, read_rope
from kvcat_nemo.runs.layout import CARD, CHECKPOINTS, HF, RECORD, WEIGHTS, RunFolder

SAME_EVERYWHERE = {
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "softmax_type": "vanilla",
    "apply_residual_connection_post_layernorm": False,
    "no_rope_freq": None,
    "mrope_section": None,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "mtp_num_layers": None,
    "heterogeneous_block_specs": False,
    "is_hybrid_model": False,
}
"""Megatron's settings with which a model is one of Hugging Face's Llama, Qwen2, Qwen3 or Mistral."""

PER_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "layernorm_epsilon",
    "share_embeddings_and_output_weights",
    "add_qkv_bias",
    "add_bias_linear",
    "qk_layernorm",
    "activation_func",
    "softmax_scale",
    "window_size",
    "rotary_base",
    "rope_scaling",
)
"""Settings that models differ in. vocab_size is without padding; window_size None or tokens per layer."""

ROPE_FIELDS = (
    "rope_scaling",
    "seq_len_interpolation_factor",
    "scale_factor",
    "low_freq_factor",
    "high_freq_factor",
    "old_context_len",
)
"""Fields of NeMo's configurations and ours that are summed up in `rope_scaling`; the last four are NeMo's Llama 3.1's."""

Function = dict[str, Any]
"""Name → plain value. A name that is not there is not known."""


def function_of_model(model: ModelConfig) -> Function:
    """The function of a Hugging Face model."""
    return dict(SAME_EVERYWHERE) | {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "vocab_size": model.vocab_size,
        "layernorm_epsilon": model.rms_norm_eps,
        "share_embeddings_and_output_weights": model.tied,
        "add_qkv_bias": model.qkv_bias,
        "add_bias_linear": model.output_bias or model.mlp_bias,
        "qk_layernorm": model.qk_norm,
        "activation_func": model.activation,
        "softmax_scale": model.kv_channels**-0.5,
        "window_size": list(model.windows) if any(model.windows) else None,
        "rotary_base": model.rope.theta,
        "rope_scaling": _plain_scaling(model.rope),
    }


def rope_of_settings(settings: Mapping[str, Any]) -> Rope:
    """The rope of Megatron's, NeMo's or our settings, by field.

    `rope_scaling` (in config.json's form) counts before NeMo's four fields of Llama 3.1. seq_len_interpolation_factor is
    the linear kind.

    Raises:
        ValueError: when a value is impossible, or two fields both stretch the context.
    """
    where = "model.config"
    given, stretch = settings.get("rope_scaling"), settings.get("seq_len_interpolation_factor")
    described = {"rope_theta": settings.get("rotary_base"), "rope_scaling": given}
    if given is None and settings.get("scale_factor") is not None:
        described["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": settings["scale_factor"],
            "low_freq_factor": settings.get("low_freq_factor"),
            "high_freq_factor": settings.get("high_freq_factor"),
            "original_max_position_embeddings": settings.get("old_context_len"),
        }
    rope = read_rope(described, where)
    if stretch in (None, 1, 1.0):
        return rope
    if rope.scaling is not None:
        raise ValueError(
            f"model.config.seq_len_interpolation_factor={stretch!r}: the rope is of kind {rope.kind!r} already; set it to None"
        )
    return read_rope(described | {"rope_scaling": {"rope_type": "linear", "factor": stretch}}, where)


def function_of_settings(settings: Mapping[str, Any]) -> Function:
    """The function of Megatron's, NeMo's or our settings; of a described run, whose callables are missing, all but those.

    Raises:
        ValueError: as `rope_of_settings`.
    """
    out = {name: _plain(settings[name]) for name in SAME_EVERYWHERE if name in settings}
    for name in PER_MODEL:
        if name in settings and name not in ("vocab_size", "rope_scaling"):
            out[name] = _plain(settings[name])
    heads, hidden = out.get("num_attention_heads"), out.get("hidden_size")
    if heads and out.get("num_query_groups", heads) is None:
        out["num_query_groups"] = heads
    if heads and hidden and out.get("kv_channels", 1) is None:
        out["kv_channels"] = hidden // heads
    if out.get("softmax_scale", 1) is None and out.get("kv_channels"):
        out["softmax_scale"] = out["kv_channels"] ** -0.5
    if "share_embeddings_and_output_weights" in out:
        out["share_embeddings_and_output_weights"] = bool(out["share_embeddings_and_output_weights"])
    vocabulary = settings.get("true_vocab_size") or settings.get("vocab_size")
    if vocabulary:
        out["vocab_size"] = vocabulary
    if settings.get("rotary_base") is not None:
        rope = rope_of_settings(settings)
        out["rotary_base"], out["rope_scaling"] = rope.theta, _plain_scaling(rope)
    return out


def _function_of_card(architecture: Mapping[str, Any]) -> Function:
    """Of the card of an imported folder whose hf/ is gone."""
    names = {
        "layernorm_epsilon": "rms_norm_eps",
        "share_embeddings_and_output_weights": "tied",
        "add_qkv_bias": "qkv_bias",
        "qk_layernorm": "qk_norm",
    }
    found = {name: names.get(name, name) for name in PER_MODEL if name != "rope_scaling"}
    out = {ours: architecture[theirs] for ours, theirs in found.items() if theirs in architecture}
    if "rope_scaling" in architecture:
        scaling = architecture["rope_scaling"]
        out["rope_scaling"] = _plain_scaling(Rope(1.0, RopeScaling(**scaling) if scaling else None))
    return dict(SAME_EVERYWHERE) | out


def _plain(value: Any) -> Any:
    if callable(value):
        return getattr(value, "__name__", type(value).__name__).lower()
    return list(value) if isinstance(value, tuple) else value


def _plain_scaling(rope: Rope) -> dict[str, Any] | None:
    out = rope.parameters()
    del out["rope_theta"]
    return out if rope.scaling else None


def differences(left: Function, right: Function) -> dict[str, tuple[Any, Any]]:
    """name → (left, right) of every name that both know and in which they differ."""
    shared = [name for name in (*PER_MODEL, *SAME_EVERYWHERE) if name in left and name in right]
    return {name: (left[name], right[name]) for name in shared if left[name] != right[name]}


def write_record(checkpoint: Path, function: Function) -> None:
    """Keep in a checkpoint's folder what its weights were trained as."""
    text = json.dumps({"format_version": 1, "function": function}, indent=2, default=str)
    (checkpoint / RECORD).write_text(text + "\n", encoding="utf-8")


def stored_function(path: str | Path) -> tuple[Function, Path] | None:
    """The function that a checkpoint's weights belong to, and the file that says so; None when nothing does.

    That is the record in a training checkpoint; for checkpoints from before there were records the configuration that
    their run kept; for an imported folder its hf/config.json.

    Args:
        path: a checkpoint's or an imported folder, or the weights/ in it.

    Raises:
        ValueError: when the file is damaged, or an imported folder's card and config.json contradict each other.
    """
    path = Path(path).absolute()
    for folder in (path, path.parent) if path.name == WEIGHTS else (path,):
        if (folder / RECORD).is_file():
            record = read_json(folder / RECORD)
            if not isinstance(record, dict) or not isinstance(record.get("function"), dict):
                raise ValueError(
                    f"{folder / RECORD} is damaged: it names no function; take another checkpoint"
                )
            return record["function"], folder / RECORD
        if (folder / CARD).is_file():
            return _of_imported(folder)
    runs = [RunFolder(parent.parent) for parent in path.parents if parent.name == CHECKPOINTS][:1]
    for file in (run.config for run in runs):
        kept = read_json(file) if file.is_file() else None
        settings = kept.get("model") if isinstance(kept, dict) else None
        if isinstance(settings, dict) and "rotary_base" in settings:
            return function_of_settings(settings), file
    return None


def _of_imported(folder: Path) -> tuple[Function, Path]:
    card = read_json(folder / CARD)
    architecture = card.get("architecture") if isinstance(card, dict) else None
    if not isinstance(architecture, dict):
        raise ValueError(f"{folder / CARD} is damaged: it names no architecture; import the model again")
    said = _function_of_card(architecture)
    file = folder / HF / "config.json"
    if not file.is_file():
        return said, folder / CARD
    described = function_of_model(parse_config(read_config(file.parent), str(file)))
    for name, (one, other) in differences(said, described).items():
        raise ValueError(
            f"{file}: {name} = {other!r}, but {folder / CARD} says {one!r}: config.json was changed after the import; put it "
            "back, or import the model again"
        )
    return described, file
