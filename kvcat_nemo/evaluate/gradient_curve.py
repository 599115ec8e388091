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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvcat_nemo.compress.gradient import optimise, sample, teach
from kvcat_nemo.compress.kivi import Quantisation
from kvcat_nemo.compress.stack import Stack
from kvcat_nemo.evaluate.cells import Cell
from kvcat_nemo.evaluate.continuation import ScoredWindows
from kvcat_nemo.evaluate.protocol import Group
from kvcat_nemo.evaluate.results import Store
from kvcat_nemo.evaluate.settings import GradientSettings
from kvcat_nemo.evaluate.statistics import jackknife, mean
from kvcat_nemo.evaluate.window_protocol import WindowProtocol
from kvcat_nemo.evaluate.windows import Window


@dataclass(kw_only=True)
class GradientCurve(GradientSettings, WindowProtocol):
    """ΔPPL per step of gradient KV optimisation."""

    over_full_cache = False

    def check_own(self, cells: list[Cell]) -> list[str]:
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

    def batch(self, number: int, windows: list[Window]) -> Group:
        return TrainedWindows(number, windows, self)

    def row(self, head: dict[str, Any], slots: int, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {**head, "lessons": self.lessons, "slots_asked": slots, **_summary(items)}

    def rows(self, store: Store, models: list[str]) -> list[dict[str, Any]]:
        rows = super().rows(store, models)
        first = {(row["compressor"], row["budget"]): row for row in rows if row["model"] == models[0]}
        for row in rows:
            if row["model"] != models[0]:
                row.update(speed_up(first[row["compressor"], row["budget"]], row))
        return rows


class TrainedWindows(ScoredWindows):
    """A batch of windows, each with a curve of figures per scored step."""

    def __init__(self, number: int, windows: list[Window], settings: GradientSettings):
        super().__init__(number, windows, settings.prefix)
        self.settings = settings

    def compressed(self, cell: Cell) -> list[dict[str, Any]]:
        batch, settings = self.batch, self.settings
        start = cell.compressor.compress(batch.prefilled, cell.budget)
        lessons = teach(batch.model, batch.prefilled.cache, self._texts())
        scored = [batch.score(start)]
        steps, losses, seconds, clock = [0], [], 0.0, time.perf_counter()

        def on_step(step) -> None:
            nonlocal seconds, clock
            seconds += time.perf_counter() - clock
            losses.append(step.losses_B)
            if step.number % settings.every == 0 or step.number == settings.steps:
                steps.append(step.number)
                scored.append(batch.score(step.cache))
            clock = time.perf_counter()

        how = {"steps": settings.steps, "lr": settings.lr, "batch": lessons.ids_BKN.shape[1]}
        optimise(batch.model, start, lessons, **how, on_step=on_step)
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

    def _texts(self) -> Tensor:
        """Token ids of the lessons, [B, K, N]."""
        batch, prefix, tokens = self.batch, self.prefix, self.settings.lesson_tokens
        count, seed = self.settings.lesson_count, self.settings.seed
        if self.settings.lessons == "continuation":
            return batch.ids[:, None, prefix:-1]
        if self.settings.lessons == "repeat":
            firsts = np.linspace(0, prefix - tokens, count).round().astype(int)
            return torch.stack([batch.ids[:, i : i + tokens] for i in firsts.tolist()], 1)
        rows = [batch.prefilled.row(b) for b in range(len(batch.ids))]
        return torch.cat([sample(x, count, tokens, seed=seed) for x in rows])


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
