"""Protocols that ask about a context: its cache is compressed once per compressor and budget, then asked every question.

Which tokens are compressed is every protocol's first decision and part of each row's key:

    question_aware False   the context alone; the question follows, uncompressed
    question_aware True    context and question together; the answer's first words follow. Like a prompt that is
                           compressed after the question is known; the budget is a share of both

Rows have, besides the protocol's own figures: contexts, items (questions), context_tokens, slots and bytes (realised,
means over items) and seconds (compression alone, mean over contexts); `by_item` lists are in the items' order.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcat_nemo import tokens
from kvcat_nemo.compress import KVCache, prefill
from kvcat_nemo.evaluate.models import ModelFolder, load_model
from kvcat_nemo.evaluate.protocol import Cell, CompressionProtocol, Protocol, fed_by_compressors
from kvcat_nemo.evaluate.results import NONE, Key, Store, write_results
from kvcat_nemo.evaluate.runner import Work, item_seed, run_items, set_threads
from kvcat_nemo.evaluate.statistics import mean
from kvcat_nemo.evaluate.window_protocol import Lazy

Tags = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Ask:
    """A question on a context."""

    id: str
    prompt: list[int]
    """Token ids that are fed after the compressed cache; at least one."""
    payload: dict[str, Any]
    """What the protocol needs to score it; plain JSON."""


@dataclass(frozen=True)
class Context:
    """Token ids whose cache is compressed, and what is asked then."""

    id: str
    ids: list[int]
    asks: tuple[Ask, ...]
    tags: Tags = ()
    """What tells a row's contexts from another row's, e.g. (("depth", "0.5"),)."""


@dataclass(kw_only=True)
class AskedProtocol(CompressionProtocol):
    """A protocol whose items are questions on contexts."""

    @property
    def question_aware(self) -> bool:
        return False

    @abstractmethod
    def check_own(self) -> list[str]:
        """Check the protocol's own settings without reading data; lines of the plan."""

    @abstractmethod
    def contexts(self, tokenizer, context: int | None) -> list[Context]:
        """All contexts. `context`: tokens that the models read at most."""

    @abstractmethod
    def own_settings(self) -> dict[str, Any]:
        """Facts that decide every item, besides the contexts."""

    @abstractmethod
    def data_facts(self) -> dict[str, Any]:
        """Fingerprints of files that were read. What is drawn from them may grow; items carry their own digests."""

    @abstractmethod
    def measure(self, model: PreTrainedModel, tokenizer, cache: KVCache, ask: Ask) -> dict[str, Any]:
        """Figures of one question over a cache, which stays as it is."""

    @abstractmethod
    def figures(self, items: list[dict], asked: list[Ask]) -> dict[str, Any]:
        """A row's own figures from its items' results."""

    def check(self) -> list[str]:
        own = self.check_own()
        models, contexts, cells = self._checked()
        asked = sum(len(c.asks) for c in contexts)
        known = "with the question" if self.question_aware else "without the question"
        return [
            f"{self.name} → {self.out}",
            f"models       {', '.join(self.model_facts(models))}",
            *own,
            f"contexts     {len(contexts)} of {min(len(c.ids) for c in contexts)} to"
            f" {max(len(c.ids) for c in contexts)} tokens, compressed {known}",
            f"compressors  {', '.join(dict.fromkeys(c.name for c in cells))}",
            f"keep         {', '.join(dict.fromkeys(c.label for c in cells))}",
            f"work         {asked} questions × {1 + len(cells)} caches × {len(models)} models",
        ]

    def _checked(self) -> tuple[list[ModelFolder], list[Context], list[Cell]]:
        models = self.check_common()
        if self.batch_size != 1:
            raise ValueError(
                f"batch_size={self.batch_size}: {self.name} takes contexts one by one; leave it at 1"
            )
        self.model_facts(models)
        if not hasattr(self, "_contexts"):
            limit = min(m.context for m in models)
            self._contexts = self.contexts(tokens.load(models[0].path), limit)
        contexts, cells = self._contexts, self.cells(min(len(c.ids) for c in self._contexts))
        for context in contexts:
            length, after = len(context.ids), max(self._after(ask) for ask in context.asks)
            fed = list(fed_by_compressors(cells, length))
            for model in models:
                model.check_reads(
                    length, after, "context, question and answer are too long: give shorter contexts"
                )
                for what, tokens_after in fed:
                    model.check_reads(
                        length, tokens_after, f"give shorter contexts, or fewer tokens of {what}"
                    )
        return models, contexts, cells

    def options_told(self) -> dict[str, Any]:
        """The options that decide which items there are, for the manifest."""
        unsaid = {field.name for field in fields(Protocol)} - {"limit"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in unsaid}

    def _after(self, ask: Ask) -> int:
        """Tokens that follow the context at most."""
        return len(ask.prompt) + int(ask.payload.get("answer_tokens", 0))

    def run(self) -> Path:
        self.check_own()
        models, contexts, cells = self._checked()
        threads = set_threads(self.threads)
        facts = {
            "protocol": self.name,
            "settings": {**self.own_settings(), "question_aware": self.question_aware},
            "data": self.data_facts(),
            "models": self.model_facts(models),
        }
        store = Store(self.out, facts)
        try:
            rows = []
            asked = sum(len(c.asks) for c in contexts)
            for model in models:
                total = asked * (1 + len(cells))
                work = self._work(model, contexts, cells)
                run_items(store, work, total=total, description=model.name, seed=self.seed)
                rows += self._rows(store, model.name, contexts, cells)
        finally:
            store.close()
        return write_results(self.out, self.name, rows, {"threads": threads, "options": self.options_told()})

    def _key(self, model: str, cell: Cell | None, tags: Tags) -> Key:
        name, label = (cell.name, cell.label) if cell else (NONE, "1")
        return Key(self.name, model, name, label, self.question_aware, tags)

    def _work(self, folder: ModelFolder, contexts: list[Context], cells: list[Cell]) -> Iterator[Work]:
        loaded = Lazy(lambda: load_model(folder, self.dtype, self.device)[:2])
        needs = {need for cell in cells for need in cell.compressor.needs}
        for context in contexts:
            prefilled = Lazy(lambda context=context: prefill(loaded()[0], [context.ids], needs=needs))
            for cell in [None, *cells]:
                key = self._key(folder.name, cell, context.tags)
                # The cache's own random state, whichever of its questions asks first.
                state = item_seed(self.seed, key, context.id)
                made = Lazy(
                    lambda cell=cell, prefilled=prefilled, state=state: _compressed(prefilled(), cell, state)
                )
                length = len(context.ids)
                for ask in context.asks:

                    def measure(made=made, ask=ask, length=length) -> dict:
                        cache, seconds = made()
                        with torch.no_grad():
                            found = self.measure(*loaded(), cache, ask)
                        cost = {"slots": cache.slots, "bytes": cache.nbytes, "seconds": seconds}
                        return {**found, **cost, "context_tokens": length}

                    yield key, item_id(context, ask), measure

    def _rows(self, store: Store, model: str, contexts: list[Context], cells: list[Cell]) -> list[dict]:
        groups: dict[Tags, list[Context]] = {}
        for context in contexts:
            groups.setdefault(context.tags, []).append(context)
        rows = []
        for cell in [None, *cells]:
            for tags, group in self.grouped(groups).items():
                rows.append(self._row(store, model, cell, tags, group))
        return rows

    def grouped(self, groups: dict[Tags, list[Context]]) -> dict[Tags, list[Context]]:
        """Which contexts make a row; a protocol may add rows over several tags."""
        return groups

    def _row(self, store: Store, model: str, cell: Cell | None, tags: Tags, contexts: list[Context]) -> dict:
        pairs = [(context, ask) for context in contexts for ask in context.asks]
        items = [store.get(self._key(model, cell, c.tags), item_id(c, ask)) for c, ask in pairs]
        asked = [cell.budget.slots(len(c.ids)) / len(c.ids) if cell else 1.0 for c in contexts]
        head = {
            "model": model,
            "compressor": cell.name if cell else NONE,
            "keep": mean(asked) if cell and cell.budget.tokens else float(cell.label) if cell else 1.0,
            "budget": cell.label if cell else "1",
            "question_aware": self.question_aware,
            **{name: _number(value) for name, value in tags},
        }
        one = {(c.id, c.tags): item for (c, _), item in zip(pairs, items, strict=True)}  # of each context
        return {
            **head,
            "contexts": len(contexts),
            "items": len(items),
            **self.figures(items, [ask for _, ask in pairs]),
            "context_tokens": mean([len(c.ids) for c in contexts]),
            "slots": mean([item["slots"] for item in items]),
            "bytes": mean([item["bytes"] for item in items]),
            "seconds": mean([item["seconds"] for item in one.values()]),
        }


def item_id(context: Context, ask: Ask) -> str:
    """Name on disk: a context or question that has changed since is measured anew."""
    content = json.dumps([context.ids, ask.prompt, ask.payload], sort_keys=True)
    return f"{context.id} {ask.id} {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _compressed(prefilled, cell: Cell | None, state: int) -> tuple[KVCache, float]:
    if cell is None:
        return prefilled.cache, 0.0
    torch.manual_seed(state)
    start = perf_counter()
    return cell.compressor.compress(prefilled, cell.budget), perf_counter() - start


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
