"""What a Megatron configuration must look like for a paired pass, checked before any process group starts."""

import contextlib
import math
import os
import warnings
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from kvcat_nemo.common.limits import check_model_sizes
from kvcat_nemo.engine import hardware
from kvcat_nemo.engine.megatron_settings import check_model_settings
from kvcat_nemo.engine.pipeline_checks import validate_stages
from kvcat_nemo.kernels import select_backend
from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.models.function import rope_of_settings


@dataclass
class KVCatFields:
    """Adds the method's settings to any Megatron or NeMo model configuration."""

    kvcat: KVCatConfig = field(default_factory=KVCatConfig)
    """The method: policy, weights, groups, router."""


@dataclass
class KVCatTransformerConfig(KVCatFields, TransformerConfig):
    """Megatron-core's own configuration with KV-CAT settings, for use without NeMo."""


def validate_model_config(config) -> None:
    """Refuse what the engine does not support. Each error names the field, the value and the fix.

    Args:
        config: a TransformerConfig (NeMo's model configurations are) with a `kvcat` field.
    """
    check_model_sizes(config)
    kvcat: KVCatConfig = config.kvcat
    kvcat.validate()
    if kvcat.gate_policy.own_model and getattr(config, "kvdistill", None) is None:
        raise ValueError(
            f"model.config.kvcat.policy={kvcat.policy!r}: only a KV-Distill model makes these gates; give router, random, attention or none"
        )

    def refuse(name: str, fix: str) -> None:
        raise ValueError(f"model.config.{name}={getattr(config, name)!r}: {fix}")

    check_model_settings(config)
    _check_context_parallelism(config, refuse)
    _check_tensor_parallelism(config)
    validate_stages(config)
    _check_attention(config)
    if getattr(config, "position_embedding_type", None) == "rope":
        rope_of_settings(vars(config))  # refuses what it cannot read
    norms = config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ())
    if norms and not hardware.installed("transformer_engine"):
        # Megatron-core 0.15's CheckpointWithoutOutput asks Transformer Engine for its FP8 state, FP8 or not.
        refuse(
            "recompute_modules",
            "Megatron recomputes norms with Transformer Engine alone; leave layernorm out",
        )
    if kvcat.paired and config.recompute_granularity is not None and config.distribute_saved_activations:
        refuse(
            "distribute_saved_activations",
            "gates are saved whole, not over ranks; set it to False, or use sequence parallelism",
        )


def _check_tensor_parallelism(config) -> None:
    ranks = config.tensor_model_parallel_size
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
    for name in names:
        value = getattr(config, name)
        if value is not None and value % ranks:
            common = math.gcd(*(getattr(config, n) for n in names if getattr(config, n) is not None))
            fitting = [n for n in range(1, common + 1) if common % n == 0 and n <= 64]
            raise ValueError(
                f"trainer.strategy.tensor_model_parallel_size={ranks}: does not divide model.config.{name}={value}"
                + (", and Megatron gives no KV head to two ranks" if name == "num_query_groups" else "")
                + f"; use {' or '.join(map(str, fitting))}"
            )
    if config.sequence_parallel and ranks == 1:
        raise ValueError(
            "trainer.strategy.sequence_parallel=True: needs tensor_model_parallel_size above 1; set it to False"
        )


def _check_context_parallelism(config, refuse) -> None:
    if config.context_parallel_size == 1:
        return
    if config.kvcat.masks_prefix:
        refuse(
            "context_parallel_size",
            "kvcat.mask_span=prefix needs all rows of one window on one rank alone; set it to 1, or kvcat.mask_span=window",
        )
    ways = config.cp_comm_type if isinstance(config.cp_comm_type, list) else [config.cp_comm_type]
    if any(way not in (None, "all_gather") for way in ways):
        refuse(
            "cp_comm_type", "keys, values and gates are gathered over ranks; set it to None or 'all_gather'"
        )
    if getattr(config, "hierarchical_context_parallel_sizes", None):
        refuse("hierarchical_context_parallel_sizes", "ranks exchange in one group; set it to None")


def _check_attention(config) -> None:
    """Kernels compute plain causal softmax attention in one of their dtypes; anything else is refused."""
    _check_environment(config)
    device = hardware.device()
    half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    # A trainer's precision may be set later; on CUDA it is bf16 or the first call says so.
    dtype = half or (config.params_dtype if device.type == "cpu" else torch.bfloat16)
    with _as_megatron_sets_it(config):
        chosen = select_backend(
            config.kvcat.attention_backend,
            device=device,
            dtype=dtype,
            head_dim=config.kv_channels,
            gated=config.kvcat.paired,
            recent_window=config.kvcat.recent_window,
            split=config.context_parallel_size > 1,
            spans=config.kvcat.masks_prefix,
        )
    if chosen == "te" and config.kvcat.masks_prefix and config.kvcat.prefix_cut_multiple < 16:
        warnings.warn(
            f"model.config.kvcat.prefix_cut_multiple={config.kvcat.prefix_cut_multiple}: every cut gives attention calls of new lengths, and "
            "cuDNN makes a plan for each length; 64 gives few lengths",
            stacklevel=2,
        )


NVTE_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""What Megatron sets for Transformer Engine when it builds a model, and asserts where they are set already."""
SET_BY_MEGATRON = {"auto": "111", "flash": "100", "fused": "010", "unfused": "001", "local": "000"}
"""model.config.attention_backend → their values, in that order (LanguageModule._set_attention_backend)."""


def _variables(config) -> dict[str, str]:
    return dict(zip(NVTE_VARIABLES, SET_BY_MEGATRON[config.attention_backend.name], strict=True))


@contextlib.contextmanager
def _as_megatron_sets_it(config):
    """The environment that Transformer Engine will choose in."""
    before = {name: os.environ.get(name) for name in NVTE_VARIABLES}
    os.environ.update(_variables(config))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_environment(config) -> None:
    """Megatron's assertion, before it fires, with the setting that says the same."""
    chosen = config.attention_backend.name
    now = {name: os.environ.get(name) for name in NVTE_VARIABLES}
    expected = _variables(config)
    wrong = {name: now[name] for name in now if now[name] not in (None, expected[name])}
    if not wrong:
        return
    asked = [now[name] or "1" for name in NVTE_VARIABLES]
    # Of kernels that cannot serve gated attention nobody asks; flash and fused differ in the first two.
    meant = {("0", "1"): "fused", ("1", "0"): "flash"}.get(tuple(asked[:2]), "auto")
    raise ValueError(
        f"{', '.join(f'{name}={value}' for name, value in wrong.items())} in the environment: Megatron sets them by "
        f"model.config.attention_backend={chosen} and stops where they differ; unset them"
        + (f" and set model.config.attention_backend={meant}" if meant != chosen else "")
    )
