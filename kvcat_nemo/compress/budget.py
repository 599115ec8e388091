"""How much of a cache may stay."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """KV slots that a compressor may keep, on average over layers and KV heads. Give exactly one of the two.

    Raises:
        ValueError: when none or both are given, or one is out of range.
    """

    keep_fraction: float | None = None
    """Kept slots / all slots, in (0, 1]. What kvpress calls compression_ratio is 1 − this."""
    tokens: int | None = None
    """Kept slots per layer and KV head, at least 1."""

    def __post_init__(self):
        if (self.keep_fraction is None) == (self.tokens is None):
            raise ValueError("Budget: give either keep_fraction or tokens, e.g. Budget(keep_fraction=0.1)")
        if self.keep_fraction is not None and not 0 < self.keep_fraction <= 1:
            raise ValueError(
                f"keep_fraction={self.keep_fraction}: give a fraction of kept slots in (0, 1]; 0.1 keeps a tenth"
            )
        if self.tokens is not None and (self.tokens < 1 or self.tokens != int(self.tokens)):
            raise ValueError(f"tokens={self.tokens}: keep at least one whole slot")

    def slots(self, length: int) -> int:
        """Slots to keep of a context of `length` tokens: the fraction of it, rounded down.

        Raises:
            ValueError: when that is none at all.
        """
        if self.tokens is not None:
            return min(self.tokens, length)
        kept = math.floor(
            round(self.keep_fraction * length, 6)
        )  # 0.29·100 is 28.999…: rounding first keeps 29
        if kept < 1:
            raise ValueError(
                f"keep_fraction={self.keep_fraction} of {length} tokens keeps nothing: give at least {1 / length:.3g},"
                " or Budget(tokens=1)"
            )
        return kept

    def __str__(self) -> str:
        return f"{100 * self.keep_fraction:g} %" if self.tokens is None else f"{self.tokens} slots"
