"""Megatron's configuration with KV-Distill's settings, and the paired pass' settings that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcat_nemo.engine.config_checks import KVCatTransformerConfig
from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.kvdistill import KVDistillConfig


def paired_settings(distill: KVDistillConfig, **changes) -> KVCatConfig:
    """The paired pass' settings of a KV-Distill run; `changes`: other fields, such as attention_backend."""
    settings = {
        "policy": "scorer",
        "mask_span": "prefix",
        "num_groups": 1,
        "distill_forward_share": distill.distill_forward_share,
        "gate_gradient_cap": distill.gate_gradient_cap,
        "seed": distill.seed,
    }
    return KVCatConfig(**settings | changes)


@dataclass
class KVDistillTransformerConfig(KVCatTransformerConfig):
    """`kvcat` is made by `paired_settings`."""

    kvdistill: KVDistillConfig = field(default_factory=KVDistillConfig)
    """The method."""
