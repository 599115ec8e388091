"""A neutral description of a dense decoder, and the Megatron configuration and model that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcat_nemo.conversion.layout import check_layout
from kvcat_nemo.models.families import FAMILIES
from kvcat_nemo.models.hf_config import parse_config
from kvcat_nemo.models.rope import RopeScaling
from kvcat_nemo.runs.vocabulary import padded

if TYPE_CHECKING:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Architecture:
    """The shape of a dense decoder, the same whichever library runs it."""

    family: str
    """A key of kvcat_nemo.models.families.FAMILIES."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """KV heads; divides num_attention_heads."""
    kv_channels: int
    """Dimension of one head; need not be hidden_size / num_attention_heads."""
    vocab_size: int
    """Rows of the embedding as the Hugging Face model has them, without Megatron's padding."""
    seq_length: int
    """max_position_embeddings, tokens."""
    rms_norm_eps: float
    rotary_base: float
    rope_scaling: RopeScaling | None
    tied: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    """Whether queries and keys pass an RMSNorm per head."""


def from_hf_config(config: Mapping[str, Any]) -> Architecture:
    """Read a Hugging Face config.json.

    Raises:
        ValueError: for an architecture or an option that the conversion would not carry over faithfully, and as
            kvcat_nemo.models.hf_config; the message names the field and its value.
    """
    _refuse_options(config)
    model = parse_config(config)
    if not FAMILIES[model.family].megatron:
        known = ", ".join(name for name, family in FAMILIES.items() if family.megatron)
        raise ValueError(
            f"config.json: unknown architecture: model_type {model.family!r}; supported are {known}"
        )
    scaling = model.rope.scaling
    if scaling is not None and scaling.rope_type not in ("linear", "llama3"):
        raise ValueError(
            f"config.json: rope_type is {scaling.rope_type!r}; supported are default, linear and llama3. If the model is to "
            "be used within its original context only, remove the scaling from a copy of the checkpoint"
        )
    if any(model.windows):
        raise ValueError(
            f"config.json: sliding_window is {next(w for w in model.windows if w)}; only full attention is supported"
        )
    return Architecture(
        family=model.family,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        vocab_size=model.vocab_size,
        seq_length=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rotary_base=model.rope.theta,
        rope_scaling=scaling,
        tied=model.tied,
        qkv_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
    )


def _refuse_options(config: Mapping[str, Any]) -> None:
    family = config.get("model_type")
    allowed = {
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "hidden_act": (None, "silu", "swish"),
        "use_sliding_window": (None, False),
        "quantization_config": (None,),
    }
    if isinstance(family, str) and family in FAMILIES and FAMILIES[family].windows == "none":
        allowed["sliding_window"] = (None,)
    for field, values in allowed.items():
        if config.get(field) not in values:
            raise ValueError(
                f"config.json: {field} is {config[field]!r}; only {values[1 % len(values)]!r} is supported for {family}"
            )
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and set(map(str, kinds)) - {"full_attention"}:
        raise ValueError(
            f"config.json: layer_types holds {sorted(set(map(str, kinds)) - {'full_attention'})}; only full_attention is "
            "supported"
        )


def load_architecture(folder: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder, or of an imported folder (its hf/ part).

    Raises:
        ValueError: when there is no config.json, or as `from_hf_config`.
    """
    from kvcat_nemo.conversion.folders import read_config

    return from_hf_config(read_config(folder))


def transformer_config(
    arch: Architecture,
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> TransformerConfig:
    """Megatron's configuration of `arch`, for the CPU host and for CUDA.

    Args:
        dtype: of the parameters and of what pipeline stages exchange; float32 when None.
        overrides: further TransformerConfig fields.

    Raises:
        ValueError: as `check_layout`.
    """
    check_layout(arch, tensor_model_parallel_size, pipeline_model_parallel_size)
    from kvcat_nemo.engine import hardware

    hardware.enable()
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = dtype or torch.float32
    fields = dict(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        attention_softmax_in_fp32=True,
        use_cpu_initialization=not hardware.is_cuda(),
        # The fused kernels need Transformer Engine or Apex; a caller that has them turns them on.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    return TransformerConfig(**(fields | overrides))


def gpt_model(
    arch: Architecture,
    config: TransformerConfig,
    *,
    layer_spec: Any = None,
    vocab_divisible_by: int = 1,
    parallel_output: bool = False,
) -> GPTModel:
    """A plain GPTModel of this rank's pipeline stage; Megatron's parallel state must be initialised.

    Args:
        layer_spec: Megatron's local spec when None.
        vocab_divisible_by: the vocabulary is padded to a multiple of this times the tensor parallel size.
        parallel_output: True leaves the logits [B, T, V_padded / tp] split over tensor parallel ranks.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model = GPTModel(
        config,
        layer_spec or get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_norm),
        vocab_size=padded(arch.vocab_size, config.tensor_model_parallel_size, vocab_divisible_by),
        max_sequence_length=arch.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,
    )
    apply_rope(model, arch)
    return model


def apply_rope(model: GPTModel, arch: Architecture) -> None:
    """Give a GPTModel exactly the rotary frequencies of `arch`; call it before the first forward pass."""
    from kvcat_nemo.engine.rotary_embedding import set_frequencies
    from kvcat_nemo.models.rope import Rope

    set_frequencies(model, arch.kv_channels, Rope(arch.rotary_base, arch.rope_scaling))
