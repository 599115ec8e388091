"""KIVI-style quantisation (arXiv 2402.02750): every slot stays, in 8 or 4 bits; the most recent ones as they were."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.compress.cache import KVCache, stack_rows
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.prefill import Prefilled
from kvcat_nemo.compress.quantised import QuantisedLayer


@dataclass
class Quantisation(Compressor):
    """Codes instead of numbers. Drops no slot: alone it takes no budget below 100 %, stacked it follows a selection."""

    bits: ClassVar[int]
    group: int = 32
    """Tokens that share the scale of a key's channel, and channels that share the scale of a token's value."""
    window: int = 32
    """Most recent slots in full precision; new ones join them, until there is a group too many. 0: none."""

    def __post_init__(self):
        if not isinstance(self.group, int) or self.group < 1:
            raise ValueError(f"group={self.group}: give at least 1 token; 32 is usual")
        if not isinstance(self.window, int) or self.window < 0:
            raise ValueError(f"window={self.window}: give 0 or more recent slots that stay in full precision")

    def compress(self, prefilled: Prefilled, budget: Budget) -> KVCache:
        for length in prefilled.lengths:
            if (slots := budget.slots(length)) < length:
                raise ValueError(
                    f"{self}: {slots} slots ({budget} of {length} tokens), but quantisation drops none: give"
                    f" keep_fraction=1, or stack it on a selection, e.g. attention-matching+{self}"
                )
        # Row by row, so that a context's codes do not depend on what it is batched with.
        cache = stack_rows([self.compress_row(prefilled.row(b), n) for b, n in enumerate(prefilled.lengths)])
        cache.facts = {**cache.facts, "compressor": str(self), "budget": asdict(budget)}
        return cache

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        return self.quantise(prefilled.cache, recent=self.window)

    def quantise(self, cache: KVCache, *, recent: int = 0) -> KVCache:
        """Codes for all slots of a cache but the last `recent` ones. New tokens are coded when they leave the window."""
        layers = [
            QuantisedLayer.of(layer, bits=self.bits, group=self.group, window=self.window, recent=recent)
            for layer in cache.layers
        ]
        return KVCache(layers, cache.lengths_B, dict(cache.facts))


@dataclass
class Int8(Quantisation):
    """8-bit codes: about half of bf16, nearly without loss."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


@dataclass
class Int4(Quantisation):
    """4-bit codes, two to a byte: about a third of bf16."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
