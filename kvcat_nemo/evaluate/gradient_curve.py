"""Gradient KV optimisation: how fast a small cache learns to say what the full one says.

Each window's prefix is compressed; the slots that stay are then trained by Adam, the model frozen, to match the logits
over the full cache (compress.gradient.optimise). After every step the continuation is scored as in continuation.py:

    delta_ppl_by_step[s]   ppl after s steps − ppl_dense, over all predictions of all windows; s = 0 is the start
    speed_up               of a model B over the first model A at the same start and budget: A's steps / the first
                           step after which B's ΔPPL is at most A's final ΔPPL (null when never, or when already so at 0)

What the slots are trained on (`lessons`):
    continuation   the very tokens that are scored: how fast, and how far, the cache can be fitted
    repeat         stretches of the prefix, fed once more: the scored tokens are never seen
    sample         the model's own continuations of the prefix: likewise
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvcat_nemo.compress.gradient import optimise, sample, teach
from kvcat_nemo.compress.kivi import Quantisation
from kvcat_nemo.compress.stack import Stack
from kvcat_nemo.evaluate.continuation import Batch
from kvcat_nemo.evaluate.models import ModelFolder, load_model
from kvcat_nemo.evaluate.protocol import Cell
from kvcat_nemo.evaluate.results import Key, Store
from kvcat_nemo.evaluate.runner import Work, item_seed, run_items
from kvcat_nemo.evaluate.statistics import jackknife, mean
from kvcat_nemo.evaluate.window_protocol import Lazy, WindowProtocol, item_id
from kvcat_nemo.evaluate.windows import Window

LESSONS = ("continuation", "repeat", "sample")


@dataclass(kw_only=True)
class GradientCurve(WindowProtocol):
    """ΔPPL per step of gradient KV optimisation."""

    name: ClassVar[str] = "gradient"
    shown: ClassVar[tuple[str, ...]] = (
        "lessons",
        "ppl_dense",
        "delta_ppl_start",
        "delta_ppl",
        "steps",
        "speed_up",
    )

    compressors: list[str] = field(default_factory=lambda: ["recent:sinks=4"])
    """Whose slots are trained; unquantised."""
    keep: list[str] = field(default_factory=lambda: ["0.05"])
    steps: int = 30
    """Adam steps."""
    lr: float = 0.02
    """Learning rate, relative to the size of keys and values."""
    every: int = 1
    """Score after every so many steps (and after the last)."""
    lessons: str = "continuation"
    """What the slots are trained on: continuation, repeat or sample."""
    lesson_count: int = 2
    """Texts, for repeat and sample."""
    lesson_tokens: int = 128
    """Tokens of each, for repeat and sample."""

    def check_own(self, cells: list[Cell]) -> list[str]:
        for name in ("steps", "every", "lesson_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: give a learning rate above 0; 0.02 is usual")
        if self.lessons not in LESSONS:
            raise ValueError(f"lessons={self.lessons!r}: choose among {', '.join(LESSONS)}")
        if self.lessons != "continuation" and not 2 <= self.lesson_tokens <= self.prefix:
            raise ValueError(
                f"lesson_tokens={self.lesson_tokens}: give 2 to {self.prefix}, the prefix' length"
            )
        for cell in cells:
            if isinstance(cell.compressor, (Quantisation, Stack)):
                raise ValueError(f"compressor {cell.name}: codes cannot be trained; start from a selection")
        texts = (
            "" if self.lessons == "continuation" else f", {self.lesson_count} × {self.lesson_tokens} tokens"
        )
        return [
            f"training     {self.steps} steps of Adam at {self.lr:g} on {self.lessons}{texts}",
            f"work         {len(self.models) * len(cells) * self.count} caches to train",
        ]

    def fed_after(self, cells: list[Cell]) -> Iterator[tuple[str, int]]:
        yield from super().fed_after(cells)
        if self.lessons != "continuation":
            yield "lesson_tokens", self.lesson_tokens

    def own_settings(self) -> dict[str, Any]:
        return self.settings(
            "prefix", "continuation", "steps", "lr", "every", "lessons", "lesson_count", "lesson_tokens"
        )

    def measure_model(
        self, store: Store, model: ModelFolder, windows: list[Window], cells: list[Cell]
    ) -> None:
        work, total = self._work(model, windows, cells), len(windows) * len(cells)
        run_items(store, work, total=total, description=model.name, seed=self.seed)

    def _key(self, model: str, cell: Cell) -> Key:
        return Key(self.name, model, cell.name, cell.label)

    def _work(self, folder: ModelFolder, windows: list[Window], cells: list[Cell]) -> Iterator[Work]:
        model = Lazy(lambda: load_model(folder, self.dtype, self.device)[0])
        needs = {need for cell in cells for need in cell.compressor.needs}
        for first in range(0, len(windows), self.batch_size):
            part = windows[first : first + self.batch_size]
            batch = Lazy(lambda part=part: Batch(model(), part, self.prefix, needs))
            for cell in cells:
                key = self._key(folder.name, cell)
                state = item_seed(self.seed, key, item_id(first, part[0]))
                curves = Lazy(lambda batch=batch, cell=cell, state=state: self._curves(batch(), cell, state))
                for i, window in enumerate(part):
                    yield key, item_id(first + i, window), lambda i=i, curves=curves: curves()[i]

    def _curves(self, batch: Batch, cell: Cell, state: int) -> list[dict]:
        """Figures per scored step of each window of a batch."""
        torch.manual_seed(state)
        start = cell.compressor.compress(batch.prefilled, cell.budget)
        lessons = teach(batch.model, batch.prefilled.cache, self._texts(batch))
        scored = [batch.score(start)]
        steps, losses, seconds, clock = [0], [], 0.0, time.perf_counter()

        def on_step(step) -> None:
            nonlocal seconds, clock
            seconds += time.perf_counter() - clock
            losses.append(step.losses_B)
            if step.number % self.every == 0 or step.number == self.steps:
                steps.append(step.number)
                scored.append(batch.score(step.cache))
            clock = time.perf_counter()

        count = lessons.ids_BKN.shape[1]
        optimise(batch.model, start, lessons, steps=self.steps, lr=self.lr, batch=count, on_step=on_step)
        return [
            {
                "steps": steps,
                **{name: [at[b][name] for at in scored] for name in ("nll", "kl", "top1")},
                "loss": [of_step[b] for of_step in losses],
                **{name: scored[0][b][name] for name in ("nll_dense", "slots", "bytes")},
                "seconds": seconds / len(scored[0]),
            }
            for b in range(len(scored[0]))
        ]

    def _texts(self, batch: Batch) -> Tensor:
        """Token ids of the lessons, [B, K, N]."""
        if self.lessons == "continuation":
            return batch.ids[:, None, self.prefix : -1]
        if self.lessons == "repeat":
            last = self.prefix - self.lesson_tokens
            firsts = np.linspace(0, last, self.lesson_count).round().astype(int)
            return torch.stack([batch.ids[:, i : i + self.lesson_tokens] for i in firsts.tolist()], 1)
        rows = [batch.prefilled.row(b) for b in range(len(batch.ids))]
        return torch.cat([sample(x, self.lesson_count, self.lesson_tokens, seed=self.seed) for x in rows])

    def rows(self, store: Store, models: list[str], windows: list[Window], cells: list[Cell]) -> list[dict]:
        rows = []
        for model in models:
            for cell in cells:
                key = self._key(model, cell)
                items = [store.get(key, item_id(i, window)) for i, window in enumerate(windows)]
                slots = cell.budget.slots(self.prefix)
                head = {
                    "model": model,
                    "compressor": key.compressor,
                    "keep": slots / self.prefix if cell.budget.tokens else cell.budget.keep_fraction,
                    "budget": key.budget,
                    "question_aware": False,
                    "lessons": self.lessons,
                    "slots_asked": slots,
                }
                rows.append({**head, **_summary(items)})
        first = {(row["compressor"], row["budget"]): row for row in rows if row["model"] == models[0]}
        for row in rows:
            if row["model"] != models[0]:
                row.update(speed_up(first[row["compressor"], row["budget"]], row))
        return rows


def _summary(items: list[dict]) -> dict:
    nll_WS = np.array([x["nll"] for x in items], dtype=np.float64)
    dense_W = np.array([x["nll_dense"] for x in items], dtype=np.float64)
    kl_WS, top1_WS = (np.array([x[name] for x in items], dtype=np.float64) for name in ("kl", "top1"))

    def delta(step: int) -> Callable[[Any], float]:
        return lambda i: float(np.exp(nll_WS[i, step].mean()) - np.exp(dense_W[i].mean()))

    everything = np.arange(len(items))
    curve = [delta(s)(everything) for s in range(nll_WS.shape[1])]
    errors = [jackknife(delta(s), len(items)) for s in range(nll_WS.shape[1])]
    return {
        "slots": mean([x["slots"] for x in items]),
        "bytes": mean([x["bytes"] for x in items]),
        "windows": len(items),
        "ppl_dense": float(np.exp(dense_W.mean())),
        "delta_ppl_start": curve[0],
        "delta_ppl": curve[-1],
        "delta_ppl_se": errors[-1],
        "kl": float(kl_WS[:, -1].mean()),
        "top1": 100 * float(top1_WS[:, -1].mean()),
        "steps": items[0]["steps"][-1],
        "step": items[0]["steps"],
        "delta_ppl_by_step": curve,
        "delta_ppl_se_by_step": errors,
        "kl_by_step": kl_WS.mean(0).tolist(),
        "loss_by_step": np.mean([x["loss"] for x in items], 0).tolist(),
        "seconds": mean([x["seconds"] for x in items]),
        "nll_by_window_and_step": nll_WS.tolist(),
        "nll_dense_by_window": dense_W.tolist(),
    }


def speed_up(first: dict, other: dict) -> dict:
    """How much sooner `other` reaches `first`'s final ΔPPL (definition: top of the file).

    Returns:
        reaches (the target ΔPPL), reached_at (step, None: never) and speed_up (None: never, or at the start already).
    """
    target = first["delta_ppl"]
    steps = zip(other["step"], other["delta_ppl_by_step"], strict=True)
    reached = next((step for step, value in steps if value <= target), None)
    return {
        "reaches": target,
        "reached_at": reached,
        "speed_up": first["steps"] / reached if reached else None,
    }
