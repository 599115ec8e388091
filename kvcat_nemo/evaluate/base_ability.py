"""Base ability: six multiple-choice benchmarks by lm-evaluation-harness, on local data, before and after training.

The tasks, their prompts and their scoring are the harness' own (harness.py); here are the data files, a subset that is
drawn the same for every model, and the paired comparison. Everything is zero-shot, on validation splits.

Rows of the results, per model, in percent
    task: accuracy ± accuracy_se, n, acc and acc_norm, and `correct`, 1 or 0 per item. Accuracy is the harness' acc_norm
        (log-likelihood over the option's length in bytes), acc where a task has no other (WinoGrande)
    task "average": the mean of the tasks' accuracies, every task alike
    with `before`: the model's difference to the first model over the same items, its standard error, and p of the
        sign-flip test (evaluate/statistics.py)
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvcat_nemo.common.files import sha256_of
from kvcat_nemo.data.assets import registry_assets
from kvcat_nemo.data.benchmarks import load_benchmark
from kvcat_nemo.evaluate.harness import local_tasks, need_harness, score_task, stored_model
from kvcat_nemo.evaluate.models import ModelFolder
from kvcat_nemo.evaluate.protocol import Protocol
from kvcat_nemo.evaluate.results import Store
from kvcat_nemo.evaluate.settings import BaseAbilitySettings
from kvcat_nemo.evaluate.statistics import mean, paired, standard_error

Samples = dict[str, dict[str, list[dict[str, float]]]]
"""Model → task → per item {"acc", "acc_norm"}."""


@dataclass(kw_only=True)
class BaseAbility(BaseAbilitySettings, Protocol):
    """Six multiple-choice benchmarks; every model is compared with the first one."""

    same_tokenizer = False  # unlike perplexities, accuracies of different tokenizers may be compared

    def prepare(self, models: list[ModelFolder]) -> list[str]:
        for task in self.tasks:
            if self._file(task).exists():
                load_benchmark(task, self._file(task))
        need_harness()
        return [
            f"tasks        {', '.join(self.tasks)}: {self.limit or 'all'} items each, no examples shown",
            f"data         {self.data}; what is missing there is fetched",
        ]

    def _file(self, task: str) -> Path:
        return Path(self.data) / f"{task}.jsonl"

    def load_data(self, models: list[ModelFolder]) -> None:
        self._files = {task: self._file(task) for task in self.tasks}
        for task, file in self._files.items():
            if not file.exists():
                registry_assets("benchmarks").fetch_benchmark(task, file, say=lambda line: None)
        sizes = {task: len(load_benchmark(task, file)) for task, file in self._files.items()}
        self._chosen = {task: drawn(size, self.limit, task, self.seed) for task, size in sizes.items()}
        self._samples: Samples = {}

    def own_settings(self) -> dict[str, Any]:
        # The limit decides which requests share a batch, and with it the last digits.
        return self.settings("tasks", "limit")

    def data_facts(self) -> dict[str, Any]:
        return {task: sha256_of(file) for task, file in self._files.items()}

    @cached_property
    def _tasks(self) -> dict[str, Any]:
        return local_tasks(self._files, Path(self.out) / "cache")

    def measure_model(self, store: Store, model: ModelFolder) -> None:
        answers = stored_model(self, model, store)
        self._samples[model.name] = {
            name: score_task(answers, name, task, self._chosen[name]) for name, task in self._tasks.items()
        }

    def rows(self, store: Store, models: list[str]) -> list[dict[str, Any]]:
        return rows(self._samples)


def drawn(count: int, limit: int | None, task: str, seed: int) -> list[int]:
    """Which of a task's `count` items are used, ascending; a smaller limit's are among a larger one's.

    Not simply the first ones: those of HellaSwag all come from one of its two sources.
    """
    order = list(range(count))
    random.Random(f"{seed} {task}").shuffle(order)
    return sorted(order[:limit])


def accuracy(items: list[dict[str, float]]) -> list[float]:
    """The figure that is reported, per item, 0 or 100: acc_norm, else acc."""
    return [100 * item.get("acc_norm", item["acc"]) for item in items]


def rows(samples: Samples) -> list[dict[str, Any]]:
    """The rows of the results; the first model is the one before."""
    out = []
    first = next(iter(samples))
    for model, tasks in samples.items():
        for task, items in tasks.items():
            right = accuracy(items)
            row = {"model": model, "task": task, "n": len(items), "accuracy": mean(right)}
            row["accuracy_se"] = standard_error(right)
            for metric in items[0]:
                values = [100 * item[metric] for item in items]
                row |= {metric: mean(values), f"{metric}_se": standard_error(values)}
            out.append({**row, "correct": [int(x > 0) for x in right]})
        average = _average([accuracy(items) for items in tasks.values()])
        out.append({"model": model, "task": "average", **average})
        if model != first:
            out += _compared(first, model, samples)
    return out


def _average(tasks: list[list[float]]) -> dict[str, Any]:
    """Mean of the tasks' means, every task alike; tasks are independent samples."""
    errors = [standard_error(values) for values in tasks]
    return {
        "n": sum(map(len, tasks)),
        "accuracy": mean([mean(values) for values in tasks]),
        "accuracy_se": None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(tasks),
    }


def _compared(before: str, after: str, samples: Samples) -> list[dict[str, Any]]:
    def row(task: str, n: int, difference: float, error: float | None, p: float) -> dict[str, Any]:
        figures = {"difference": difference, "difference_se": error, "p": p}
        return {"model": after, "before": before, "task": task, "n": n, **figures}

    tasks = {t: (accuracy(samples[before][t]), accuracy(samples[after][t])) for t in samples[after]}
    out = []
    for task, (old, new) in tasks.items():
        found = paired(old, new)
        out.append(row(task, found.n, found.difference, found.standard_error, found.p))
    average = _average([[b - a for a, b in zip(old, new, strict=True)] for old, new in tasks.values()])
    # Weighted so that the test's mean over all items is the mean of the tasks' means.
    n = average["n"] / len(tasks)
    old, new = ([x * n / len(both[i]) for both in tasks.values() for x in both[i]] for i in (0, 1))
    out.append(row("average", average["n"], average["accuracy"], average["accuracy_se"], paired(old, new).p))
    return out
