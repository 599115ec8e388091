"""The seam to lm-evaluation-harness: its tasks on local files, and a model whose answers are kept on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from kvcat_nemo.evaluate.models import ModelFolder, load_model
from kvcat_nemo.evaluate.results import Key, Store
from kvcat_nemo.evaluate.runner import run_items
from kvcat_nemo.tokens import DEFAULT, IdRules, document_ids

REQUESTS = 32
"""Requests per item on disk; a multiple of the usual batch sizes."""


def need_harness() -> None:
    """Make sure that the harness can be imported, and that it will never wait for a hub.

    Raises:
        ValueError: it is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = (
        "1"  # before it and datasets are imported
    )
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        hint = "base-ability needs lm-evaluation-harness: pip install 'kvcat-nemo[evaluate]'"
        raise ValueError(f"{hint} ({error})") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def local_tasks(files: dict[str, Path], cache: str | Path) -> dict[str, Any]:
    """The harness' tasks by name, each with a local JSON-lines file as its only data.

    Args:
        cache: folder for the arrow form that `datasets` makes of the files.

    Raises:
        ValueError: a file whose records don't share their fields' types.
    """
    import datasets
    import lm_eval.tasks

    datasets.disable_progress_bars()
    changes = {
        **{"dataset_path": "json", "dataset_name": None, "num_fewshot": 0},
        **{"training_split": None, "validation_split": "validation", "test_split": None},
    }
    # These tasks' folders alone: the harness' whole index of some 14,000 tasks takes ten seconds to build.
    root = Path(lm_eval.tasks.__file__).parent
    paths = [str(root / folder) for folder in sorted({name.partition("_")[0] for name in files})]
    manager, tasks = lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False), {}
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


def score_task(model, name: str, task: Any, chosen: list[int]) -> list[dict[str, float]]:
    """The harness' metrics of each chosen item, in order: {"acc": 0 or 1, "acc_norm": 0 or 1 where the task has it}.

    Args:
        model: what `stored_model` returned; chosen: ascending places of the items.
    """
    from lm_eval.evaluator import evaluate

    model.task = name
    alone = {"tasks": {name: task}, "groups": {}, "group_map": {}}
    done = evaluate(model, alone, samples={name: chosen}, bootstrap_iters=0)
    items = done["samples"][name]
    assert [item["doc_id"] for item in items] == chosen
    return [
        {metric: float(item[metric]) for metric in ("acc", "acc_norm") if metric in item} for item in items
    ]


def harness_model() -> type:
    """The harness' model with our ids: its own would end a context with EOS where the tokenizer adds one."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **unused):
            rules = IdRules("never") if add_special_tokens is False else DEFAULT
            ids = document_ids(self.tokenizer, string, rules)
            return ids[-left_truncate_len:] if left_truncate_len else ids

    return Model


def stored_model(protocol, folder: ModelFolder, store: Store):
    """An lm_eval model that keeps every answer in the store and loads the weights when one is missing.

    Args:
        protocol: has name, dtype, device, batch_size and seed.
    """
    from lm_eval.api.model import LM

    class StoredModel(LM):
        task = ""
        inner = None

        def loglikelihood(self, requests):
            key = Key(protocol.name, folder.name, extra=(("task", self.task),))
            # Cut the same way whatever is on disk: which requests share a batch decides the last digits.
            parts = [requests[i : i + REQUESTS] for i in range(0, len(requests), REQUESTS)]
            items = [(f"{number:05}", part) for number, part in enumerate(parts)]
            run_items(
                store,
                ((key, item, lambda part=part: self._measure(part)) for item, part in items),
                total=len(items),
                description=f"{folder.name}, {self.task}",
                seed=protocol.seed,
            )
            answers = []
            for item, part in items:
                result = store.get(key, item)
                if result["requests"] != _digest(part):
                    raise ValueError(
                        f"{store.out}: {key}, {item} answers other questions; give another folder"
                    )
                answers += zip(result["loglikelihood"], result["greedy"], strict=True)
            return answers

        def _measure(self, part) -> dict:
            if self.inner is None:
                model, tokenizer, _ = load_model(folder, protocol.dtype, protocol.device)
                size = protocol.batch_size
                self.inner = harness_model()(
                    model, tokenizer=tokenizer, batch_size=size, max_length=folder.context
                )
            values = self.inner.loglikelihood(part, disable_tqdm=True)
            return {
                "requests": _digest(part),
                "loglikelihood": [float(value) for value, _ in values],
                "greedy": [bool(greedy) for _, greedy in values],
            }

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError("none of the tasks scores whole texts")

        def generate_until(self, requests):
            raise NotImplementedError("none of the tasks generates")

    return StoredModel()


def _digest(requests: list) -> str:
    return hashlib.sha256(repr([request.args for request in requests]).encode()).hexdigest()
