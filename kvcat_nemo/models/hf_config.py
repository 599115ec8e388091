"""config.json of a Hugging Face model: read and checked once, every value that changes the model's function in one form.

Defaults are those of transformers' classes, the same in 4.57 and 5.2. Where the two versions, or two fields of one file,
would lead to different models, the file is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.common.limits import check_config_sizes
from kvcat_nemo.models.config_values import agreed, flag, number, refuse, whole
from kvcat_nemo.models.families import FAMILIES, kv_heads, windows
from kvcat_nemo.models.rope import Rope, read_rope


@dataclass(frozen=True)
class ModelConfig:
    """Every value of config.json that changes what the model computes."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """KV heads; divides num_attention_heads."""
    kv_channels: int
    """Dimension of one head; need not be hidden_size / num_attention_heads."""
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tied: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool
    output_bias: bool
    """Bias of attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """Whether queries and keys pass an RMSNorm per head."""
    activation: str
    windows: tuple[int | None, ...]
    """Per layer: tokens that it attends to at most; None for all."""


def read_json(path: Path) -> Any:
    """A JSON file in which no object names a field twice.

    Raises:
        ValueError: when it is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder as it stands there.

    Raises:
        ValueError: when there is none, or it is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json; give a Hugging Face model folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no model's configuration: it holds no JSON object; fetch it again")
    return config


def read_vocabulary(folder: str | Path) -> int | None:
    """vocab_size of a folder with a tokenizer; None when the folder has no config.json or none in it.

    Raises:
        ValueError: when it is no whole number.
    """
    if not (Path(folder) / "config.json").is_file():
        return None
    size = read_config(folder).get("vocab_size")
    return None if size is None else whole(str(Path(folder) / "config.json"), "vocab_size", size)


def read_model(folder: str | Path) -> ModelConfig:
    """The model of a Hugging Face folder.

    Raises:
        ValueError: as `read_config` and `parse_config`.
    """
    return parse_config(read_config(folder), str(Path(folder) / "config.json"))


def parse_config(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that a configuration describes.

    Args:
        where: the file's name for messages.

    Raises:
        ValueError: for an unknown architecture, a missing or impossible value, or fields that contradict each other;
            the message has the form field = value: why; what to do.
    """
    check_config_sizes(config, where)
    name = config.get("model_type")
    classes = config.get("architectures") or None
    if (
        not isinstance(name, str)
        or name not in FAMILIES
        or classes not in (None, [FAMILIES[name].architecture])
    ):
        known = ", ".join(f"{m} ({f.architecture})" for m, f in FAMILIES.items())
        raise ValueError(
            f"{where}: unknown architecture: model_type={name!r}, architectures={classes!r}; known are {known}"
        )
    family = FAMILIES[name]
    if config.get("transformers_weights") is not None:
        refuse(
            where,
            "transformers_weights",
            config["transformers_weights"],
            "transformers would load that file instead of the folder's weights",
            "remove the field",
        )
    _one_dtype(config, where)

    def size(field: str, at_most: int = 2**31 - 1) -> int:
        if config.get(field) is None:
            raise ValueError(f"{where}: {field} is missing; add it")
        return whole(where, field, config[field], at_most=at_most)

    layers = size("num_hidden_layers")
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    groups = kv_heads(config, family, name, heads, where)
    if heads % groups:
        raise ValueError(
            f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    head_dim = config.get("head_dim")
    head_dim = (
        (family.head_dim or hidden // heads) if head_dim is None else whole(where, "head_dim", head_dim)
    )
    if head_dim % 2 or not head_dim:
        refuse(where, "head_dim", head_dim, "rope turns pairs of dimensions", "use an even head_dim")
    eps = config.get("rms_norm_eps")
    bias = flag(where, "attention_bias", config.get("attention_bias"))
    mlp_bias = flag(where, "mlp_bias", config.get("mlp_bias"))
    if mlp_bias and not family.mlp_bias:
        refuse(where, "mlp_bias", True, f"{family.architecture} has no such biases", "set it to false")
    activation = agreed(
        where,
        {"hidden_act": config.get("hidden_act"), "hidden_activation": config.get("hidden_activation")},
        "the classes read hidden_act alone",
    )
    if activation is not None and config.get("hidden_act") is None:
        refuse(
            where, "hidden_activation", activation, "the classes read hidden_act alone", "name it hidden_act"
        )
    return ModelConfig(
        family=name,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        vocab_size=size("vocab_size"),
        max_position_embeddings=size("max_position_embeddings"),
        rms_norm_eps=1e-6 if eps is None else number(where, "rms_norm_eps", eps, above=0.0),
        rope=read_rope(config, where),
        tied=flag(where, "tie_word_embeddings", config.get("tie_word_embeddings")),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=bias and family.qkv_bias is None,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        activation={None: "silu", "swish": "silu"}.get(activation, activation),
        windows=windows(config, family, layers, where),
    )


def _one_dtype(config: Mapping, where: str) -> None:
    # transformers 4.56 renamed torch_dtype to dtype.
    kinds = {field: config.get(field) for field in ("dtype", "torch_dtype")}
    plain = {f: v.removeprefix("torch.") if isinstance(v, str) else v for f, v in kinds.items()}
    agreed(where, plain, "older versions of transformers take torch_dtype")
