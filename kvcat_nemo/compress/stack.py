"""A selection and then a quantisation: `attention-matching+int4`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.compress.cache import KVCache, stack_rows
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.kivi import Quantisation
from kvcat_nemo.compress.prefill import Prefilled


@dataclass
class Stack(Compressor):
    """Any compressor's slots, quantised. Unlike quantisation alone it codes the recent slots too.

    Which slots matter is the selection's matter; the quantisation's window serves the tokens that come later.
    """

    selection: Compressor
    quantisation: Quantisation

    def __post_init__(self):
        if not isinstance(self.quantisation, Quantisation):
            raise ValueError(f"{self}: after + comes a quantisation, int8 or int4, with its settings")
        if isinstance(self.selection, (Quantisation, Stack)):
            raise ValueError(f"{self}: quantised twice; give one selection and one quantisation")

    @property
    def name(self) -> str:
        return str(self)

    @property
    def needs(self) -> tuple[str, ...]:
        return self.selection.needs

    @property
    def smallest(self) -> int:
        return self.selection.smallest

    def compress(self, prefilled: Prefilled, budget: Budget) -> KVCache:
        return self._quantised(self.selection.compress(prefilled, budget))

    def tokens_after(self, length: int) -> int:
        return self.selection.tokens_after(length)

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        return self._quantised(self.selection.compress_row(prefilled, slots))

    def _quantised(self, cache: KVCache) -> KVCache:
        # Row by row, so that a context's codes do not depend on what it is batched with.
        quantised = stack_rows([self.quantisation.quantise(cache.row(b)) for b in range(cache.batch)])
        quantised.facts = {**cache.facts, "compressor": str(self)}
        return quantised

    @property
    def settings(self) -> dict[str, Any]:
        return {"selection": self.selection.settings, "quantisation": self.quantisation.settings}

    def __str__(self) -> str:
        return f"{self.selection}+{self.quantisation}"
