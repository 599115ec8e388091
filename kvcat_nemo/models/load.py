"""Loading a Hugging Face model with transformers, 4.57 or 5.x, and proof that it is the model that config.json describes.

transformers is given a configuration with nothing left to a default, in the form that its version reads. What it built
is then compared with our reading, value by value.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvcat_nemo.common.limits import check_config_fits_weights
from kvcat_nemo.models.families import FAMILIES
from kvcat_nemo.models.frequencies import float32_error, inverse_frequencies
from kvcat_nemo.models.hf_config import ModelConfig, parse_config, read_config
from kvcat_nemo.models.rope import CONFIG_FIELDS
from kvcat_nemo.models.weights import IGNORED, check_tied, find_weights


def hf_config(folder: str | Path):
    """transformers' configuration of a folder, the same function whichever version is installed.

    Raises:
        ValueError: as kvcat_nemo.models.hf_config.
    """
    raw = read_config(folder)
    return _hf_config(raw, parse_config(raw, str(Path(folder) / "config.json")))


def _hf_config(raw: dict[str, Any], model: ModelConfig):
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    dropped = (*CONFIG_FIELDS, "original_max_position_embeddings", "dtype", "torch_dtype", "layer_types")
    fields = {name: value for name, value in raw.items() if name not in dropped}
    fields |= {
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "rms_norm_eps": model.rms_norm_eps,
        "hidden_act": model.activation,
        "tie_word_embeddings": model.tied,
    }
    if FAMILIES[model.family].windows == "some":
        fields["layer_types"] = ["sliding_attention" if w else "full_attention" for w in model.windows]
        fields["sliding_window"] = next((w for w in model.windows if w), None)
        fields["use_sliding_window"] = any(model.windows)
    else:
        fields["sliding_window"] = model.windows[0]
    rope = model.rope.parameters()
    if int(transformers.__version__.split(".")[0]) >= 5:
        fields["rope_parameters"] = rope
    else:
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = rope if model.rope.scaling else None
    return CONFIG_MAPPING[model.family].from_dict(fields)


def load_causal_lm(folder: str | Path, dtype: torch.dtype = torch.float32, **options):
    """transformers' model of a folder, on the CPU, in evaluation mode.

    Args:
        options: more arguments of from_pretrained, such as attn_implementation.

    Raises:
        ValueError: when the folder is not one model, read in one way; when weights are missing, unknown or misshapen; or
            when transformers built another function than config.json describes.
    """
    from transformers import AutoModelForCausalLM

    raw = read_config(folder)
    expected = parse_config(raw, str(Path(folder) / "config.json"))
    weights = find_weights(folder)
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    check_config_fits_weights(raw, shapes, str(Path(folder) / "config.json"))
    check_tied(folder, weights, expected.tied)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=_hf_config(raw, expected),
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            use_safetensors=True,
            **options,
        )
    except Exception as error:  # transformers raises a dozen kinds for a damaged folder
        raise ValueError(f"model {str(folder)!r} cannot be loaded ({error})") from error
    wrong = {
        kind: found[:3]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if (found := sorted(str(name) for name in info[kind] if not IGNORED.fullmatch(str(name))))
    }
    if wrong:
        raise ValueError(f"model {str(folder)!r} does not load as it should: {wrong}")
    if expected.tied:
        # transformers 5 leaves a stored output layer by itself. It is the embedding, bit for bit: check_tied has seen to it.
        model.lm_head.weight = model.model.embed_tokens.weight
    check_loaded(model, expected, str(folder))
    return model.eval()


def check_loaded(model, expected: ModelConfig, where: str) -> None:
    """Compare what a loaded model computes with what its config.json describes.

    Raises:
        ValueError: names every value that differs, with both readings.
    """
    import transformers

    found = differences(model, expected)
    if found:
        raise ValueError(
            f"{where}: transformers {transformers.__version__} built another model than config.json describes: "
            f"{'; '.join(found)}. Use another version of transformers (4.57 and 5.2 are tested)"
        )


def differences(model, expected: ModelConfig) -> list[str]:
    """ "name: loaded value, expected value" of everything in which a loaded model differs from a configuration."""
    found = []

    def compare(name: str, loaded: Any, wanted: Any) -> None:
        if loaded != wanted:
            found.append(f"{name} is {loaded!r}, config.json says {wanted!r}")

    backbone = model.model
    compare("num_hidden_layers", len(backbone.layers), expected.num_layers)
    compare("vocab_size", backbone.embed_tokens.num_embeddings, expected.vocab_size)
    compare("tie_word_embeddings", model.lm_head.weight is backbone.embed_tokens.weight, expected.tied)
    compare("the output layer's bias", model.lm_head.bias is not None, False)
    found += _rope_differences(backbone.rotary_emb, expected)
    compare("rms_norm_eps of norm", backbone.norm.variance_epsilon, expected.rms_norm_eps)
    for number, layer in enumerate(backbone.layers):
        if len(found) > 5:
            break  # the first few say enough
        for name, loaded, wanted in _layer(layer, number, expected):
            compare(f"layer {number}: {name}", loaded, wanted)
    return found


def _layer(layer, number: int, expected: ModelConfig) -> list[tuple[str, Any, Any]]:
    from transformers.activations import ACT2FN

    attention, mlp = layer.self_attn, layer.mlp
    dim = expected.kv_channels
    widths = [m.out_features for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
    kv = expected.num_query_groups * dim
    rows = [
        ("head_dim", attention.head_dim, dim),
        ("softmax scale", attention.scaling, dim**-0.5),
        ("query heads per KV head", attention.num_key_value_groups, expected.num_attention_heads // expected.num_query_groups),
        ("widths of queries, keys and values", widths, [expected.num_attention_heads * dim, kv, kv]),
        ("attention_bias", [m.bias is not None for m in (attention.q_proj, attention.k_proj, attention.v_proj)], [expected.qkv_bias] * 3),
        ("bias of o_proj", attention.o_proj.bias is not None, expected.output_bias),
        ("mlp_bias", [m.bias is not None for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)], [expected.mlp_bias] * 3),
        ("intermediate_size", mlp.gate_proj.out_features, expected.ffn_hidden_size),
        ("query and key norms", hasattr(attention, "q_norm") and hasattr(attention, "k_norm"), expected.qk_norm),
        ("sliding_window", _window(layer, attention, number), expected.windows[number]),
    ]  # fmt: skip
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention.q_norm, attention.k_norm] if expected.qk_norm else []
    rows += [("rms_norm_eps", norm.variance_epsilon, expected.rms_norm_eps) for norm in norms]
    rows.append(("hidden_act", type(mlp.act_fn).__name__, type(ACT2FN[expected.activation]).__name__))
    return rows


def _window(layer, attention, number: int) -> int | None:
    config = attention.config
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None:
        return window if kinds[number] == "sliding_attention" else None
    return window if FAMILIES[config.model_type].windows == "all" else None


def _rope_differences(rotary, expected: ModelConfig) -> list[str]:
    rope, dim = expected.rope, expected.kv_channels
    loaded = rotary.inv_freq.detach().double().cpu()
    wanted = inverse_frequencies(dim, rope.theta, rope.scaling, torch.float64)
    found = []
    if loaded.shape != wanted.shape:
        found.append(f"{loaded.numel()} rotary frequencies, config.json says {wanted.numel()}")
    else:
        error = ((loaded - wanted).abs() / wanted).max().item()
        allowed = float32_error(rope.theta, rope.scaling)
        if not error <= allowed:  # not ">": NaN must fail too
            found.append(
                f"the rope's frequencies are off by a factor of up to {1 + error:.4g} from config.json's "
                f"(rope_theta {rope.theta:g}, rope_type {rope.kind!r})"
            )
    if abs(rotary.attention_scaling - rope.attention_scaling) > 1e-6 * rope.attention_scaling:
        found.append(
            f"the rope's attention_scaling is {rotary.attention_scaling!r}, config.json says {rope.attention_scaling!r}"
        )
    if getattr(rotary, "rope_type", rope.kind) != rope.kind:
        found.append(f"rope_type is {rotary.rope_type!r}, config.json says {rope.kind!r}")
    return found
