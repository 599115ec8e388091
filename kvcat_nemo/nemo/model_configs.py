"""NeMo's model configurations with KV-CAT settings: one line each, nothing copied."""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnBackend
from nemo.collections import llm
from nemo.lightning import get_vocab_size

from kvcat_nemo.common.limits import check_model_sizes
from kvcat_nemo.engine import hardware
from kvcat_nemo.engine.config_checks import KVCatFields, validate_model_config
from kvcat_nemo.engine.paired_model import KVCatGPTModel
from kvcat_nemo.engine.rotary_embedding import set_frequencies
from kvcat_nemo.engine.spec import has_transformer_engine, kvcat_block_spec
from kvcat_nemo.models.function import rope_of_settings

_FUSIONS = (
    "gradient_accumulation_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "persist_layer_norm",
    "cross_entropy_loss_fusion",
)

_FUSIONS_OF_TRANSFORMER_ENGINE = ("gradient_accumulation_fusion", "apply_rope_fusion")
"""Those that Megatron refuses on CUDA without it (or apex); the others are PyTorch's."""


@dataclass
class KVCatModelConfig(KVCatFields):
    """Mixed into a NeMo GPT configuration: builds the paired model instead of NeMo's."""

    attention_backend: str = "auto"
    """What Megatron allows Transformer Engine to choose from: auto, flash, fused, unfused or local. Its own type, an
    enumeration, has no form on a command line. Which kernel computes attention is `kvcat.attention_backend`."""
    true_vocab_size: Optional[int] = None
    """Tokens of the vocabulary without padding; columns after it take no probability. None: `vocab_size`."""
    rope_scaling: Optional[dict[str, Any]] = None
    """The rope's kind in config.json's form, e.g. {"rope_type": "linear", "factor": 4.0}; default, linear or llama3. None: what
    the recipe's configuration says. It must be the base model's (nemo.base_model)."""

    def __post_init__(self):
        check_model_sizes(self)
        if isinstance(self.attention_backend, str):
            known = {member.name: member for member in AttnBackend}
            if self.attention_backend not in known:
                raise ValueError(
                    f"model.config.attention_backend={self.attention_backend!r}: choose one of {', '.join(sorted(known))}; the "
                    "kernel of gated attention is model.config.kvcat.attention_backend"
                )
            self.attention_backend = known[self.attention_backend]
        if not hardware.is_cuda():
            for name in _FUSIONS:
                setattr(self, name, False)
            self.use_cpu_initialization = True
            self.deallocate_pipeline_outputs = (
                False  # gloo may still be reading what an overlapped exchange frees
            )
            self.bf16 = self.fp16 = False
            self.params_dtype = self.pipeline_dtype = self.autocast_dtype = torch.float32
        elif not has_transformer_engine():
            for name in _FUSIONS_OF_TRANSFORMER_ENGINE:
                setattr(self, name, False)
        super().__post_init__()

    def configure_model(self, tokenizer, pre_process=None, post_process=None, vp_stage=None) -> KVCatGPTModel:
        """Build this rank's part of the paired model; called by NeMo's GPTModel.

        Raises:
            ValueError: when a setting does not fit a paired pass (engine.config_checks.validate_model_config).
        """
        validate_model_config(self)
        if vp_stage is None and self.virtual_pipeline_model_parallel_size:
            vp_stage = 0  # Lightning asks for a model before NeMo asks for its chunks
        vocab_size = self.vocab_size or get_vocab_size(
            self, tokenizer.vocab_size, self.make_vocab_size_divisible_by
        )
        tp = parallel_state.get_tensor_model_parallel_world_size()
        model = KVCatGPTModel(
            self,
            transformer_layer_spec=kvcat_block_spec(self, vp_stage=vp_stage),
            vocab_size=-(-vocab_size // tp) * tp,
            true_vocab_size=self.true_vocab_size or vocab_size,
            max_sequence_length=self.seq_length,
            parallel_output=True,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type=self.position_embedding_type,
            rotary_percent=self.rotary_percent,
            rotary_base=self.rotary_base,
            pre_process=pre_process
            or parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=post_process
            or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            scatter_embedding_sequence_parallel=self.scatter_embedding_sequence_parallel,
            vp_stage=vp_stage,
        )
        if self.position_embedding_type == "rope":
            rotated = int(self.kv_channels * self.rotary_percent)
            set_frequencies(model, rotated, rope_of_settings(vars(self)))
        return model


# The mixin's fields have defaults, and so have all of NeMo's; it stands first so that its methods win.


@dataclass
class KVCatLlamaConfig(KVCatModelConfig, llm.LlamaConfig):
    """Any Llama without rope scaling."""


@dataclass
class KVCatSmolLM2Config135M(KVCatLlamaConfig):
    """SmolLM2-135M: 30 layers, 9 query heads on 3 KV heads, tied embeddings."""

    num_layers: int = 30
    hidden_size: int = 576
    ffn_hidden_size: int = 1536
    num_attention_heads: int = 9
    num_query_groups: int = 3
    kv_channels: int = 64
    vocab_size: int = 49152
    seq_length: int = 8192
    rotary_base: float = 100000.0
    layernorm_epsilon: float = 1e-5
    share_embeddings_and_output_weights: bool = True


@dataclass
class KVCatLlama31Config8B(KVCatModelConfig, llm.Llama31Config8B):
    """Llama-3.1-8B, with the vocabulary that NeMo leaves to the tokenizer."""

    vocab_size: int = 128256


@dataclass
class KVCatQwen2Config(KVCatModelConfig, llm.Qwen2Config):
    """Any dense Qwen2 or Qwen2.5."""


@dataclass
class KVCatQwen25Config500M(KVCatModelConfig, llm.Qwen25Config500M):
    """Qwen2.5-0.5B. Its embeddings are tied, which NeMo's configuration does not say."""

    share_embeddings_and_output_weights: bool = True


@dataclass
class KVCatQwen25Config1P5B(KVCatModelConfig, llm.Qwen25Config1P5B):
    """Qwen2.5-1.5B, tied like the 0.5B."""

    share_embeddings_and_output_weights: bool = True


@dataclass
class KVCatQwen25Config7B(KVCatModelConfig, llm.Qwen25Config7B):
    """Qwen2.5-7B."""


@dataclass
class KVCatQwen3Config1P7B(KVCatModelConfig, llm.Qwen3Config1P7B):
    """Qwen3-1.7B."""
