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
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcat_nemo import tokens
from kvcat_nemo.compress import KVCache, prefill
from kvcat_nemo.evaluate.cells import Cell, fed_by_compressors
from kvcat_nemo.evaluate.haystack import text_fingerprint
from kvcat_nemo.evaluate.models import ModelFolder
from kvcat_nemo.evaluate.options import options_of
from kvcat_nemo.evaluate.protocol import CompressionProtocol, Group, Tags
from kvcat_nemo.evaluate.results import Store
from kvcat_nemo.evaluate.settings import HiddenSettings, ProtocolSettings, QuestionSettings
from kvcat_nemo.evaluate.statistics import mean


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


@dataclass(kw_only=True)
class QuestionProtocol(QuestionSettings, CompressionProtocol):
    """A protocol whose items are questions on contexts."""

    @abstractmethod
    def check_own(self) -> list[str]:
        """Check the protocol's own settings without reading data; lines of the plan."""

    @abstractmethod
    def contexts(self, tokenizer, context: int | None) -> list[Context]:
        """All contexts. `context`: tokens that the models read at most."""

    @abstractmethod
    def measure(self, model: PreTrainedModel, tokenizer, cache: KVCache, ask: Ask) -> dict[str, Any]:
        """Figures of one question over a cache, which stays as it is."""

    @abstractmethod
    def figures(self, items: list[dict], asked: list[Ask]) -> dict[str, Any]:
        """A row's own figures from its items' results."""

    def grouped(self, groups: dict[Tags, list[Context]]) -> dict[Tags, list[Context]]:
        """Which contexts make a row; a protocol may add rows over several tags."""
        return groups

    def prepare(self, models: list[ModelFolder]) -> list[str]:
        own = self.check_own()
        if self.batch_size != 1:
            raise ValueError(
                f"batch_size={self.batch_size}: {self.name} takes contexts one by one; leave it at 1"
            )
        self.model_facts(models)
        if not hasattr(self, "_contexts"):
            limit = min(m.context for m in models)
            self._contexts = self.contexts(tokens.load(models[0].path), limit)
        contexts, cells = self._contexts, self.cells()
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
        lengths = [len(c.ids) for c in contexts]
        known = "with the question" if self.question_aware else "without the question"
        asked = sum(len(c.asks) for c in contexts)
        return [
            *own,
            f"contexts     {len(contexts)} of {min(lengths)} to {max(lengths)} tokens, compressed {known}",
            *self.plan_of(cells),
            f"work         {asked} questions × {1 + len(cells)} caches × {len(models)} models",
        ]

    def cells(self) -> list[Cell]:
        return self.cells_of(min(len(c.ids) for c in self._contexts))

    def _after(self, ask: Ask) -> int:
        """Tokens that follow the context at most."""
        return len(ask.prompt) + int(ask.payload.get("answer_tokens", 0))

    def settings(self, *names: str) -> dict[str, Any]:
        return {**super().settings(*names), "question_aware": self.question_aware}

    def told(self) -> dict[str, Any]:
        """The options that decide which items there are."""
        unsaid = {field.name for field in fields(ProtocolSettings)} - {"limit"}
        return {
            "options": {name: getattr(self, name) for name in options_of(type(self)) if name not in unsaid}
        }

    def groups(self) -> Iterator[Group]:
        for context in self._contexts:
            yield AskedContext(context, self)

    def rows(self, store: Store, models: list[str]) -> list[dict[str, Any]]:
        groups: dict[Tags, list[Context]] = {}
        for context in self._contexts:
            groups.setdefault(context.tags, []).append(context)
        rows = self.grouped(groups).items()
        cells = self._measured_cells()
        return [
            self._row(store, m, cell, tags, group) for m in models for cell in cells for tags, group in rows
        ]

    def _row(
        self, store: Store, model: str, cell: Cell | None, tags: Tags, contexts: list[Context]
    ) -> dict[str, Any]:
        pairs = [(context, ask) for context in contexts for ask in context.asks]
        items = [store.get(self.key(model, cell, c.tags), item_id(c, ask)) for c, ask in pairs]
        one = {(c.id, c.tags): item for (c, _), item in zip(pairs, items, strict=True)}  # of each context
        return {
            **self.head(model, cell, [len(c.ids) for c in contexts]),
            **{name: _number(value) for name, value in tags},
            "contexts": len(contexts),
            "items": len(items),
            **self.figures(items, [ask for _, ask in pairs]),
            "context_tokens": mean([len(c.ids) for c in contexts]),
            "slots": mean([item["slots"] for item in items]),
            "bytes": mean([item["bytes"] for item in items]),
            "seconds": mean([item["seconds"] for item in one.values()]),
        }


@dataclass(kw_only=True)
class HiddenProtocol(HiddenSettings, QuestionProtocol):
    """A protocol that hides things in text: `samples` contexts of each kind, which the compressor reads with or without
    the question."""

    @property
    def question_aware(self) -> bool:
        return self.question == "known"

    @property
    def count(self) -> int:
        """Contexts of each kind."""
        return self.samples if self.limit is None else min(self.samples, self.limit)

    def own_settings(self) -> dict[str, Any]:
        return self.settings("question")

    def data_facts(self) -> dict[str, Any]:
        """What is drawn from the text may grow: items carry their own digests."""
        return {"text": text_fingerprint(self.text)}


class AskedContext(Group):
    """The questions on one context."""

    def __init__(self, context: Context, protocol: QuestionProtocol):
        super().__init__([item_id(context, ask) for ask in context.asks], context.tags, context.id)
        self.context, self.protocol = context, protocol

    def open(self, model: PreTrainedModel, tokenizer, needs: set[str]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prefilled = prefill(model, [self.context.ids], needs=needs)

    def compressed(self, cell: Cell | None) -> tuple[KVCache, float]:
        if cell is None:
            return self.prefilled.cache, 0.0
        start = perf_counter()
        return cell.compressor.compress(self.prefilled, cell.budget), perf_counter() - start

    def measure(self, compressed: tuple[KVCache, float], number: int) -> dict[str, Any]:
        cache, seconds = compressed
        with torch.no_grad():
            found = self.protocol.measure(self.model, self.tokenizer, cache, self.context.asks[number])
        cost = {"slots": cache.slots, "bytes": cache.nbytes, "seconds": seconds}
        return {**found, **cost, "context_tokens": len(self.context.ids)}


def item_id(context: Context, ask: Ask) -> str:
    """Name on disk: a context or question that has changed since is measured anew."""
    content = json.dumps([context.ids, ask.prompt, ask.payload], sort_keys=True)
    return f"{context.id} {ask.id} {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
