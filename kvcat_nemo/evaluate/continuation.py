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

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcat_nemo.compress import KVCache, Prefilled, next_logits, prefill
from kvcat_nemo.evaluate.models import ModelFolder, load_model
from kvcat_nemo.evaluate.protocol import Cell, CompressionProtocol
from kvcat_nemo.evaluate.results import NONE, Key, Store, write_results
from kvcat_nemo.evaluate.runner import Work, item_seed, run_items, set_threads
from kvcat_nemo.evaluate.statistics import jackknife, mean, standard_error
from kvcat_nemo.evaluate.windows import CONTINUATION, PREFIX, Window, windows_fingerprint
from kvcat_nemo.evaluate.windows_source import WindowSource


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
        return self._logits(self.prefilled.cache)

    @torch.no_grad()
    def _logits(self, cache: KVCache) -> Tensor:
        return next_logits(self.model, cache, self.ids[:, self.prefix : -1])

    def score(self, cache: KVCache) -> list[dict]:
        """Figures of each window under a cache of its prefix."""
        full = cache is self.prefilled.cache
        logits_BNV = self.dense_BNV if full else self._logits(cache)
        out = []
        for b, targets_N in enumerate(self.ids[:, self.prefix + 1 :]):
            row = cache.row(b)
            figures = compare(self.dense_BNV[b], logits_BNV[b], targets_N)
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


def _measure(batch: Batch, cell: Cell | None, state: int) -> list[dict]:
    torch.manual_seed(state)  # the batch's, whichever of its windows asks first
    return batch.measure(cell)


def compare(dense_NV: Tensor, logits_NV: Tensor, targets_N: Tensor) -> dict[str, float]:
    """NLL of both (nats), KL(dense ‖ other) and top-1 agreement (fraction), means over the predictions."""
    wide = torch.float64 if dense_NV.dtype == torch.float64 else torch.float32
    p, q = (x.to(wide).log_softmax(-1) for x in (dense_NV, logits_NV))
    nll_dense, nll = (-x.gather(-1, targets_N[:, None]).double().mean().item() for x in (p, q))
    kl = (p.exp() * (p - q)).sum(-1).double().mean().item()
    top1 = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    return {"nll": nll, "nll_dense": nll_dense, "kl": kl, "top1": top1}


@dataclass(kw_only=True)
class Continuation(WindowSource, CompressionProtocol):
    """Compressed-prefix continuation on windows of text."""

    name: ClassVar[str] = "continuation"
    shown: ClassVar[tuple[str, ...]] = (
        "ppl_dense",
        "delta_ppl",
        "delta_ppl_se",
        "kl",
        "top1",
        "slots",
        "seconds",
    )

    prefix: int = PREFIX
    """Tokens whose cache is compressed."""
    continuation: int = CONTINUATION
    """Tokens that follow, of which all but the first are scored."""

    def check(self) -> list[str]:
        models, cells = self._checked()
        facts = self.model_facts(models)
        source = self.check_windows(models, self.prefix + self.continuation)
        passes = len(models) * (1 + len(cells))
        return [
            f"continuation → {self.out}",
            f"models       {', '.join(facts)}",
            f"windows      {source}: {self.prefix} tokens compressed, {self.continuation - 1} predictions each",
            f"compressors  {', '.join(dict.fromkeys(c.name for c in cells))}",
            f"keep         {', '.join(dict.fromkeys(c.label for c in cells))}",
            f"work         {passes} rows, {passes * self.count} passes over a continuation",
        ]

    def _checked(self) -> tuple[list[ModelFolder], list[Cell]]:
        models = self.check_common()
        if self.prefix < 1 or self.continuation < 2:
            raise ValueError(
                f"prefix={self.prefix}, continuation={self.continuation}: give at least 1 token to compress and 2 that"
                " follow, as the first of them is not scored"
            )
        length = self.prefix + self.continuation
        for model in models:
            if model.context is not None and model.context < length:
                raise ValueError(
                    f"model {model.name}: reads {model.context} tokens, a window has {length}; give a smaller prefix"
                )
        return models, self.cells(self.prefix)

    def run(self) -> Path:
        models, cells = self._checked()
        facts = self.model_facts(models)
        windows = self.load(models, self.prefix + self.continuation)
        threads = set_threads(self.threads)
        store = Store(
            self.out,
            {
                "protocol": self.name,
                "settings": self.settings("prefix", "continuation"),
                "data": {"windows": windows_fingerprint(windows)},
                "models": facts,
            },
        )
        self.keep_windows(windows)
        windows = windows[: self.limit]
        rows = []
        for model in models:
            work = self._work(model, windows, cells)
            total = len(windows) * (1 + len(cells))
            run_items(store, work, total=total, description=model.name, seed=self.seed)
            rows += [self._row(store, model.name, windows, cell) for cell in [None, *cells]]
        told = {"windows": [{"source": w.source, "doc": w.doc, "start": w.start} for w in windows]}
        path = write_results(self.out, self.name, rows, {**told, "threads": threads, "question_aware": False})
        store.close()
        return path

    def _key(self, model: str, cell: Cell | None) -> Key:
        return Key(self.name, model, cell.name if cell else NONE, cell.label if cell else "1")

    def _work(self, folder: ModelFolder, windows: list[Window], cells: list[Cell]) -> Iterator[Work]:
        model = _Lazy(lambda: load_model(folder, self.dtype, self.device)[0])
        needs = {need for cell in cells for need in cell.compressor.needs}
        for first in range(0, len(windows), self.batch_size):
            part = windows[first : first + self.batch_size]
            batch = _Lazy(lambda part=part: Batch(model(), part, self.prefix, needs))
            for cell in [None, *cells]:
                key = self._key(folder.name, cell)
                state = item_seed(self.seed, key, item_id(first, part[0]))
                figures = _Lazy(lambda batch=batch, cell=cell, state=state: _measure(batch(), cell, state))
                for i, window in enumerate(part):
                    yield key, item_id(first + i, window), lambda i=i, figures=figures: figures()[i]

    def _row(self, store: Store, model: str, windows: list[Window], cell: Cell | None) -> dict:
        key = self._key(model, cell)
        items = [store.get(key, item_id(i, window)) for i, window in enumerate(windows)]
        slots = cell.budget.slots(self.prefix) if cell else self.prefix
        head = {
            "model": model,
            "compressor": key.compressor,
            "keep": slots / self.prefix if cell and cell.budget.tokens else float(key.budget.rstrip("t")),
            "budget": key.budget,
            "question_aware": False,
            "slots_asked": slots,
            "slots_full": self.prefix,
        }
        return {**head, **summary(items, self.continuation - 1)}


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


def item_id(number: int, window: Window) -> str:
    """Place among the windows and tokens; both, so that a window that is there twice is measured twice."""
    return f"{number}-{hashlib.sha256(json.dumps(window.ids).encode()).hexdigest()[:12]}"


class _Lazy:
    """Calls once, when first asked, and keeps the answer."""

    def __init__(self, function):
        self.function = function

    def __call__(self):
        if not hasattr(self, "value"):
            self.value = self.function()
        return self.value
