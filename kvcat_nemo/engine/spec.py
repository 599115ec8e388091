"""The layer spec: Megatron's own (Transformer Engine's where it is installed), with our layer, attention and norm."""

from __future__ import annotations

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from kvcat_nemo.engine.compat.gates import GatedSelfAttention
from kvcat_nemo.engine.core_attention import GatedCoreAttention
from kvcat_nemo.engine.layer import KVCatTransformerLayer


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be used: it is installed, and there is a CUDA device to build its modules on."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMSNorm with the argument names that Megatron builds norms with, sequence parallelism included."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__(hidden_size, eps=eps)
        # Marks the weight for the gradient sum over the ranks that each normalise a slice of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel


def kvcat_block_spec(
    config, vp_stage: int | None = None, layer_class: type = KVCatTransformerLayer
) -> ModuleSpec:
    """Spec of this rank's decoder block.

    Args:
        config: TransformerConfig with a `kvcat` field; normalization must be RMSNorm without Transformer Engine.
        layer_class: of its layers.
    """
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
    else:
        if config.normalization != "RMSNorm":
            raise ValueError(
                f"model.config.normalization={config.normalization!r}: only RMSNorm is supported without Transformer Engine"
            )
        layer, norm = (
            get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm"),
            RMSNorm,
        )
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        if attention.q_layernorm is not IdentityOp:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    layer.module = layer_class
    layer.submodules.self_attention.module = GatedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = GatedCoreAttention
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return ModuleSpec(
        module=TransformerBlock,
        submodules=TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm),
    )
