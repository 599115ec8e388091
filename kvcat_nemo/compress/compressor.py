"""What a compressor is: it turns the full cache of a context into a smaller one.

A new one is a dataclass of its settings with one method, `compress_row`; validation, batches of unequal lengths, short
contexts and the record of what was done are here.
"""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.compress.cache import KVCache, stack_rows
from kvcat_nemo.compress.context_limit import check_positions
from kvcat_nemo.compress.prefill import Prefilled, prefill


@dataclass
class Compressor(ABC):
    """Base of all compressors. Fields of a subclass are its settings; they are part of every result's key."""

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    """What prefill must record: of prefill.NEEDS."""
    trained: ClassVar[bool] = False
    """Whether it is made of a file that training wrote, which a setting names."""
    smallest: ClassVar[int] = 1
    """Slots without which it cannot work (its window, its sinks)."""

    def tokens_after(self, length: int) -> int:
        """Tokens that it feeds behind a context of `length` tokens, at most: the model must read these as well."""
        return 0

    @abstractmethod
    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        """The smaller cache of one row, with `slots` < its length slots per layer and KV head on average."""

    def compress(self, prefilled: Prefilled, budget: Budget) -> KVCache:
        """Compress every row to its budget. A row that is within its budget is left as it is, with a warning.

        Raises:
            ValueError: when the budget keeps nothing, or fewer slots than the compressor can work with, or the model does
                not read what the compressor feeds behind the context.
        """
        short = [n for n in prefilled.lengths if budget.slots(n) < n]
        check_positions(
            prefilled.model.config,
            short,
            [self.tokens_after(n) for n in short],
            what=f"{self}: context and what it reads behind it",
            fix="shorten the context or the compressor's texts",
        )
        rows = []
        for b, length in enumerate(prefilled.lengths):
            slots = budget.slots(length)
            if slots >= length:
                if budget.keep_fraction != 1:
                    warnings.warn(
                        f"{self}: a context of {length} tokens is within the budget of {budget}; left as it is",
                        stacklevel=2,
                    )
                rows.append(prefilled.cache.row(b))
                continue
            if slots < self.smallest:
                raise ValueError(
                    f"{self}: {slots} slots ({budget} of {length} tokens), but it needs {self.smallest}; give a larger"
                    " budget or smaller settings"
                )
            rows.append(self.compress_row(prefilled.row(b), slots))
        cache = stack_rows(rows)
        cache.facts = {
            **prefilled.cache.facts,
            **cache.facts,
            "compressor": str(self),
            "budget": asdict(budget),
        }
        return cache

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """The specification that makes it again: name and settings other than the defaults."""
        default = type(self)()
        changed = [f"{key}={value}" for key, value in self.settings.items() if value != getattr(default, key)]
        return ":".join([self.name, *changed])


def select(prefilled: Prefilled, scores: list[torch.Tensor], slots: int) -> KVCache:
    """Keep the slots with the highest scores, in text order.

    Args:
        scores: [1, G, T] per layer; +∞ keeps for sure.
    """
    layers = []
    for layer, score_BGT in zip(prefilled.cache.layers, scores, strict=True):
        index = score_BGT.topk(slots, dim=-1).indices.sort(-1).values
        layers.append(layer.take(index))
    return KVCache(layers, prefilled.cache.lengths_B)


@dataclass
class Compressed:
    """What a compression gave, and what it cost."""

    cache: KVCache
    full_nbytes: int
    """Bytes of the cache before."""
    seconds: float
    """Compression alone, without the prefill."""


def compress(
    model: PreTrainedModel, rows: Iterable[list[int]], compressor: Compressor, budget: Budget
) -> Compressed:
    """Prefill and compress in one call."""
    prefilled = prefill(model, rows, needs=compressor.needs)
    start = time.perf_counter()
    cache = compressor.compress(prefilled, budget)
    return Compressed(cache, prefilled.cache.nbytes, time.perf_counter() - start)
