"""What all protocols share: the whole run, from its check to its results, and cells of compressor × budget.

A protocol says which items there are and how each is measured (`items`), and sums them up (`rows`). Everything else is
here: the settings are checked before any work, models are compared, finished items are skipped, results are written.

Most protocols compress: `CompressionProtocol` turns groups of items that share a prefill into cells × items, so that such
a protocol gives its groups alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcat_nemo.evaluate.cells import Cell, cells_of
from kvcat_nemo.evaluate.models import ModelFolder, choose_device, find_models, load_model, model_facts
from kvcat_nemo.evaluate.results import NONE, Key, Store, write_results
from kvcat_nemo.evaluate.runner import Lazy, Work, item_seed, run_items, set_threads
from kvcat_nemo.evaluate.settings import CompressionSettings, ProtocolSettings
from kvcat_nemo.evaluate.statistics import mean

Tags = tuple[tuple[str, str], ...]
"""What tells rows of one compressor and budget apart, e.g. (("depth", "0.5"),)."""


@dataclass(kw_only=True)
class Protocol(ProtocolSettings, ABC):
    """An evaluation with its settings."""

    same_tokenizer = True
    """Whether the models must have one tokenizer: the same tokens mean different texts otherwise."""

    @abstractmethod
    def prepare(self, models: list[ModelFolder]) -> list[str]:
        """Check what the options' own ranges do not, without loading weights; lines of the plan.

        Raises:
            ValueError: on anything that would stop the run later; the message names the setting.
        """

    @abstractmethod
    def own_settings(self) -> dict[str, Any]:
        """Settings that decide every item (see `settings`)."""

    @abstractmethod
    def data_facts(self) -> dict[str, Any]:
        """Fingerprints of the data, as far as they decide every item."""

    @abstractmethod
    def measure_model(self, store: Store, model: ModelFolder) -> None:
        """Put a model's items into the store; `run_items` skips those that are there."""

    @abstractmethod
    def rows(self, store: Store, models: list[str]) -> list[dict[str, Any]]:
        """Rows of the results, from the store."""

    def load_data(self, models: list[ModelFolder]) -> None:
        """Read or fetch what `prepare` only looked at; before the results folder is made."""

    def told(self) -> dict[str, Any]:
        """What else the results' manifest tells."""
        return {}

    def check(self) -> list[str]:
        """The plan, a line each; loads no weights.

        Raises:
            ValueError: on anything that would stop the run later; the message names the setting.
        """
        return self._checked()[1]

    def _checked(self) -> tuple[list[ModelFolder], list[str]]:
        self.check_options()
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise ValueError(f"out={self.out!r} is a file; give a folder")
        choose_device(self.device)
        models = find_models(self.models)
        plan = self.prepare(models)
        facts = self.model_facts(models)
        return models, [f"{self.name} → {self.out}", f"models       {', '.join(facts)}", *plan]

    def run(self) -> Path:
        """Measure what is missing and write OUT/results.json; returns its path."""
        models, _ = self._checked()
        self.load_data(models)
        threads = set_threads(self.threads)
        facts = {
            "protocol": self.name,
            "settings": self.own_settings(),
            "data": self.data_facts(),
            "models": self.model_facts(models),
        }
        with closing(Store(self.out, facts)) as store:
            for model in models:
                self.measure_model(store, model)
            rows = self.rows(store, [model.name for model in models])
            return write_results(self.out, self.name, rows, {"threads": threads, **self.told()})

    def settings(self, *names: str) -> dict[str, Any]:
        """Facts that decide every item: the named settings and those of all protocols."""
        device = choose_device(self.device).type
        shared = {"dtype": self.dtype, "device": device, "batch_size": self.batch_size, "seed": self.seed}
        return {**{name: getattr(self, name) for name in names}, **shared}

    def model_facts(self, models: list[ModelFolder]) -> dict[str, dict[str, str]]:
        """Fingerprints by name, as the results' facts hold them (no paths: those may change).

        Raises:
            ValueError: when tokenizers differ, whose tokens and perplexities cannot be compared.
        """
        facts = {m.name: model_facts(m) for m in models}
        if self.same_tokenizer and len({f.tokenizer for f in facts.values()}) > 1:
            raise ValueError(
                f"models: {', '.join(facts)} have different tokenizers, so the same tokens mean different texts; evaluate"
                " them in runs of their own"
            )
        return {name: f.facts() for name, f in facts.items()}


class Group(ABC):
    """Items that share a prefill: windows of a batch, or the questions on one context.

    Args:
        items: their ids, names on disk.
        tags: what tells their rows from other rows.
        seed_item: the id that seeds the compressor, whichever of the items asks first.
    """

    def __init__(self, items: list[str], tags: Tags, seed_item: str):
        self.items, self.tags, self.seed_item = items, tags, seed_item

    @abstractmethod
    def open(self, model: PreTrainedModel, tokenizer, needs: set[str]) -> None:
        """Prepare what all cells share. `needs`: what prefill must record."""

    @abstractmethod
    def compressed(self, cell: Cell | None) -> Any:
        """What the items of a cell share, such as the compressed cache; None: the full cache."""

    @abstractmethod
    def measure(self, compressed: Any, number: int) -> dict[str, Any]:
        """Figures of one item, plain JSON."""


@dataclass(kw_only=True)
class CompressionProtocol(CompressionSettings, Protocol):
    """A protocol that measures groups of items under compressors at budgets."""

    over_full_cache = True
    """Whether items are measured over the full cache too."""
    question_aware = False
    """Whether the compressors see the question."""

    @abstractmethod
    def groups(self) -> Iterator[Group]:
        """The items, in the order in which they are measured."""

    @abstractmethod
    def cells(self) -> list[Cell]:
        """Compressors at budgets (see `cells_of`)."""

    def measure_model(self, store: Store, model: ModelFolder) -> None:
        total = sum(len(group.items) for group in self.groups()) * len(self._measured_cells())
        run_items(store, self._work(model), total=total, description=model.name, seed=self.seed)

    def _measured_cells(self) -> list[Cell | None]:
        return [*([None] if self.over_full_cache else []), *self.cells()]

    def _work(self, folder: ModelFolder) -> Iterator[Work]:
        loaded = Lazy(lambda: load_model(folder, self.dtype, self.device)[:2])
        cells = self._measured_cells()
        needs = {need for cell in cells if cell for need in cell.compressor.needs}
        for group in self.groups():
            opened = Lazy(lambda group=group: group.open(*loaded(), needs))
            for cell in cells:
                key = self.key(folder.name, cell, group.tags)
                state = item_seed(self.seed, key, group.seed_item)

                def compressed(group=group, opened=opened, cell=cell, state=state) -> Any:
                    opened()
                    if cell is not None:
                        torch.manual_seed(state)
                    return group.compressed(cell)

                shared = Lazy(compressed)
                for number, item in enumerate(group.items):
                    yield key, item, lambda g=group, s=shared, n=number: g.measure(s(), n)

    def key(self, model: str, cell: Cell | None, tags: Tags = ()) -> Key:
        """The key of a row's items."""
        name, label = (cell.name, cell.label) if cell else (NONE, "1")
        return Key(self.name, model, name, label, self.question_aware, tags)

    def head(self, model: str, cell: Cell | None, lengths: list[int]) -> dict[str, Any]:
        """The first fields of a row, of contexts of the given lengths in tokens."""
        name, label = (cell.name, cell.label) if cell else (NONE, "1")
        by_slots = cell is not None and cell.budget.tokens is not None
        keep = mean([cell.budget.slots(n) / n for n in lengths]) if by_slots else float(label)
        return {
            "model": model,
            "compressor": name,
            "keep": keep,
            "budget": label,
            "question_aware": self.question_aware,
        }

    def settings(self, *names: str) -> dict[str, Any]:
        # "auto" is not said: results folders from before there was a choice go on.
        return super().settings(*names, *(["bos"] if self.bos != "auto" else []))

    def cells_of(self, length: int) -> list[Cell]:
        """The compressors at the budgets, for contexts of at least that many tokens; see cells.cells_of."""
        return cells_of(self.compressors, self.keep, length)

    def plan_of(self, cells: list[Cell]) -> list[str]:
        """Lines of the plan that name compressors and budgets."""
        return [
            f"compressors  {', '.join(dict.fromkeys(c.name for c in cells))}",
            f"keep         {', '.join(dict.fromkeys(c.label for c in cells))}",
        ]
