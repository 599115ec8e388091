"""Inverse frequencies of a rope, and what float32 can do to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvcat_nemo.models.rope import RopeScaling, YarnScaling

if TYPE_CHECKING:
    import torch


def inverse_frequencies(
    head_dim: int, base: float, scaling: RopeScaling | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Inverse frequencies [head_dim / 2], on the CPU, computed in `dtype` (float32 when None).

    llama3 scaling after Meta's Llama 3.1 reference code, yarn after arXiv 2309.00071. Megatron-core has llama3's formula
    but fixes low_freq_factor, high_freq_factor and the original context to 1, 4 and 8192.
    """
    import torch

    dtype = dtype or torch.float32
    frequencies = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim))
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if isinstance(scaling, YarnScaling):
        kept = _yarn_kept(head_dim, base, scaling, dtype)
        return frequencies / scaling.factor * (1 - kept) + frequencies * kept
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    stretched = torch.where(wavelength > low, frequencies / scaling.factor, frequencies)
    smooth = (scaling.original_max_position / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * stretched / scaling.factor + smooth * stretched
    return torch.where((wavelength >= high) & (wavelength <= low), between, stretched)


def _yarn_kept(head_dim: int, base: float, scaling: YarnScaling, dtype: torch.dtype) -> torch.Tensor:
    """Share of each dimension's own frequency that stays, [head_dim / 2]."""
    import torch

    def dimension(rotations: float) -> float:
        length = scaling.original_max_position
        return head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # as in transformers: a ramp of no width
    return 1 - ((torch.arange(head_dim // 2, dtype=dtype) - low) / width).clamp(0, 1)


def float32_error(base: float, scaling: RopeScaling | None) -> float:
    """Largest relative error of inverse frequencies that are computed in float32.

    A power carries the rounding of its exponent, at most 1, times ln(base), and a few roundings of its own. A ramp
    between f / factor and f turns an error of its argument into one of the result that is `factor` times larger; the
    argument of llama3's is high / (high - low) times as sensitive as the frequency.
    """
    unit = 2.0**-24
    power = math.log(base) + 8
    if scaling is None or scaling.rope_type == "linear":
        return unit * (power + 2)
    steepness = 1.0
    if scaling.rope_type == "llama3":
        steepness = scaling.high_freq_factor / (scaling.high_freq_factor - scaling.low_freq_factor)
    stretch = max(scaling.factor, 1 / scaling.factor)
    return unit * (power + 8) * (1 + stretch * (1 + steepness))
