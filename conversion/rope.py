"""Rotary position embedding: which variants are understood, and their exact inverse frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RopeScaling:
    """How the inverse frequencies are stretched for long contexts."""

    rope_type: str
    """"linear" (all frequencies divided by `factor`) or "llama3" (only the low ones)."""
    factor: float
    """Stretch of the context, > 0."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position / low_freq_factor are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position / high_freq_factor are left alone."""
    original_max_position: int = 8192
    """llama3: context length of the pretraining, tokens."""


def rope_from_config(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The rotary base and the scaling of a Hugging Face config (`rope_scaling` or the newer `rope_parameters`).

    Raises:
        ValueError: for a rope type other than default, linear and llama3, or a missing factor.
    """
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = dict(config.get(field) or {})
    base = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise ValueError(
            "config.json: partial_rotary_factor must be 1.0; models that rotate a part of each head are not supported"
        )
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return base, None
    if rope_type not in ("linear", "llama3"):
        raise ValueError(
            f"config.json: {field}.rope_type is {rope_type!r}; supported are default, linear and llama3. "
            f"If the model is to be used within its original context only, remove {field} from a copy of the checkpoint"
        )
    names = {"factor": "factor"}
    if rope_type == "llama3":
        names |= {
            "low_freq_factor": "low_freq_factor",
            "high_freq_factor": "high_freq_factor",
            "original_max_position_embeddings": "original_max_position",
        }
    missing = [name for name in names if rope.get(name) is None]
    if missing:
        raise ValueError(f"config.json: {field} of type {rope_type!r} lacks {', '.join(missing)}; add it")
    return base, RopeScaling(rope_type, **{ours: rope[theirs] for theirs, ours in names.items()})


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Inverse frequencies [head_dim / 2], float32, on the CPU.

    llama3 scaling after Meta's Llama 3.1 reference code. Megatron-core has the same formula but fixes
    low_freq_factor, high_freq_factor and the original context to 1, 4 and 8192.
    """
    import torch

    frequencies = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    stretched = torch.where(wavelength > low, frequencies / scaling.factor, frequencies)
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where((wavelength >= high) & (wavelength <= low), between, stretched)
