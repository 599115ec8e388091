"""Compressed-prefix continuation: how well a model goes on with a text whose beginning it sees through a smaller cache.

A window is P prefix tokens x_0 … x_{P−1} and C continuation tokens x_P … x_{P+C−1} (768 and 256 by default).

- The prefix is prefilled, its cache compressed to the budget. The prefill's last logits, which predict x_P, come from
  the uncompressed pass: x_P is not scored.
- x_P … x_{P+C−2} are fed after the compressed cache at their positions in the text, and their logits are scored
  against x_{P+1} … x_{P+C−1}: C − 1 predictions a window (255).
- Dense is the same over the full cache, which equals one forward pass over the window.

With NLL_w the mean over a window's predictions of −ln p(x), W windows, and m = mean over windows:

    ppl            exp(m NLL_w): over all predictions, as every window has equally many
    delta_ppl      ppl − ppl_dense; its standard error is the jackknife's over windows. The headline
    delta_ppl_windows   m (exp NLL_w − exp NLL_w,dense), which weighs hard windows more; standard error of the mean
    kl             KL(dense ‖ compressed) per prediction, nats
    top1           share of predictions where both rank the same token first, in percent
    slots, bytes   realised, per window: slots per layer and KV head on average; bytes of the whole cache
    seconds        compression alone, per window, without the prefill

Shapes: B windows of a batch, N = C − 1 predictions, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcat_nemo.compress import KVCache, Prefilled, next_logits, prefill
from kvcat_nemo.evaluate.cells import Cell
from kvcat_nemo.evaluate.protocol import Group
from kvcat_nemo.evaluate.settings import ContinuationSettings
from kvcat_nemo.evaluate.statistics import jackknife, mean, standard_error
from kvcat_nemo.evaluate.window_protocol import WindowProtocol, item_ids
from kvcat_nemo.evaluate.windows import Window


class Batch:
    """Windows that go through the model together. What all compressors need of them is computed once, when needed.

    Args:
        prefix: tokens of the compressed part; needs: what prefill must record.
    """

    def __init__(self, model: PreTrainedModel, windows: list[Window], prefix: int, needs: set[str]):
        self.model, self.prefix, self.needs = model, prefix, needs
        device = model.get_input_embeddings().weight.device
        self.ids = torch.tensor([w.ids for w in windows], device=device)

    @cached_property
    def prefilled(self) -> Prefilled:
        return prefill(self.model, self.ids[:, : self.prefix].tolist(), needs=self.needs)

    @cached_property
    def dense_BNV(self) -> Tensor:
        """Log-probabilities over the full cache."""
        return log_probabilities(self._logits(self.prefilled.cache))

    @torch.no_grad()
    def _logits(self, cache: KVCache) -> Tensor:
        return next_logits(self.model, cache, self.ids[:, self.prefix : -1])

    def score(self, cache: KVCache) -> list[dict]:
        """Figures of each window under a cache of its prefix."""
        full = cache is self.prefilled.cache
        logits_BNV = None if full else self._logits(cache)
        out = []
        for b, targets_N in enumerate(self.ids[:, self.prefix + 1 :]):
            row, dense_NV = cache.row(b), self.dense_BNV[b]
            other_NV = dense_NV if full else log_probabilities(logits_BNV[b])
            figures = compare(dense_NV, other_NV, targets_N)
            out.append({**figures, "slots": row.slots, "bytes": row.nbytes})
        return out

    def measure(self, cell: Cell | None) -> list[dict]:
        """Compress (None: don't) and score."""
        if cell is None:
            return [{**x, "seconds": 0.0} for x in self.score(self.prefilled.cache)]
        prefilled, start = self.prefilled, time.perf_counter()
        cache = cell.compressor.compress(prefilled, cell.budget)
        seconds = (time.perf_counter() - start) / len(self.ids)
        return [{**x, "seconds": seconds} for x in self.score(cache)]


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """In float64: in float32 the sum over a large vocabulary comes out systematically low (8e-6 nats at 49,152)."""
    return logits_NV.double().log_softmax(-1)


def compare(dense_NV: Tensor, other_NV: Tensor, targets_N: Tensor) -> dict[str, float]:
    """NLL of both (nats), KL(dense ‖ other) and top-1 agreement (fraction), means over the predictions.

    Args:
        dense_NV, other_NV: log-probabilities.
    """
    nll_dense, nll = (-x.gather(-1, targets_N[:, None]).mean().item() for x in (dense_NV, other_NV))
    kl = (dense_NV.exp() * (dense_NV - other_NV)).sum(-1).mean().item()
    top1 = (dense_NV.argmax(-1) == other_NV.argmax(-1)).double().mean().item()
    return {"nll": nll, "nll_dense": nll_dense, "kl": kl, "top1": top1}


@dataclass(kw_only=True)
class Continuation(ContinuationSettings, WindowProtocol):
    """Compressed-prefix continuation on windows of text."""

    def check_own(self, cells: list[Cell]) -> list[str]:
        rows = len(self.models) * (1 + len(cells))
        return [f"work         {rows} rows, {rows * self.count} passes over a continuation"]

    def own_settings(self) -> dict[str, Any]:
        return self.settings("prefix", "continuation")

    def batch(self, number: int, windows: list[Window]) -> Group:
        return ScoredWindows(number, windows, self.prefix)

    def row(self, head: dict[str, Any], slots: int, items: list[dict[str, Any]]) -> dict[str, Any]:
        asked = {"slots_asked": slots, "slots_full": self.prefix}
        return {**head, **asked, **summary(items, self.continuation - 1)}


class ScoredWindows(Group):
    """A batch of windows, scored under each cell."""

    def __init__(self, number: int, windows: list[Window], prefix: int):
        names = item_ids(number, windows)
        super().__init__(names, (), names[0])
        self.windows, self.prefix = windows, prefix

    def open(self, model: PreTrainedModel, tokenizer, needs: set[str]) -> None:
        self.batch = Batch(model, self.windows, self.prefix, needs)

    def compressed(self, cell: Cell | None) -> list[dict[str, Any]]:
        return self.batch.measure(cell)

    def measure(self, compressed: list[dict[str, Any]], number: int) -> dict[str, Any]:
        return compressed[number]


def summary(items: list[dict], predictions: int) -> dict:
    """A row's figures from its windows' (definitions: top of the file). Lists are per window, in their order."""
    column = {name: np.array([x[name] for x in items], dtype=np.float64) for name in items[0]}
    nll, dense = column["nll"], column["nll_dense"]

    def delta(i) -> float:
        return float(np.exp(nll[i].mean()) - np.exp(dense[i].mean()))

    everything = np.arange(len(items))
    each = np.exp(nll) - np.exp(dense)
    return {
        "slots": mean(column["slots"]),
        "bytes": mean(column["bytes"]),
        "windows": len(items),
        "predictions": predictions * len(items),
        "ppl": float(np.exp(nll.mean())),
        "ppl_dense": float(np.exp(dense.mean())),
        "delta_ppl": delta(everything),
        "delta_ppl_se": jackknife(delta, len(items)),
        "delta_ppl_windows": mean(each),
        "delta_ppl_windows_se": standard_error(each),
        "kl": mean(column["kl"]),
        "kl_se": standard_error(column["kl"]),
        "top1": 100 * mean(column["top1"]),
        "top1_se": None if len(items) < 2 else 100 * standard_error(column["top1"]),
        "seconds": mean(column["seconds"]),
        "nll_by_window": nll.tolist(),
        "nll_dense_by_window": dense.tolist(),
        "kl_by_window": column["kl"].tolist(),
        "top1_by_window": column["top1"].tolist(),
    }
