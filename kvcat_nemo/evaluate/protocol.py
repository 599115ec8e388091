"""What all protocols share: settings that are checked as a whole before any work, and cells of compressor × budget.

A protocol is a dataclass of its settings with `check` and `run`. The command line and sweeps build it by name, so that
a new one needs a line in PROTOCOLS and a command.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kvcat_nemo.common.limits import check_upper
from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.kivi import Quantisation
from kvcat_nemo.compress.registry import make
from kvcat_nemo.evaluate.models import DTYPES, ModelFolder, choose_device, find_models, model_facts
from kvcat_nemo.evaluate.results import budget_label, parse_budget
from kvcat_nemo.tokens import IdRules

# name → module:class in kvcat_nemo.evaluate; imported when used.
PROTOCOLS = {
    "continuation": "continuation:Continuation",
    "gradient": "gradient_curve:GradientCurve",
    "needle": "needle:Needle",
    "long-qa": "long_qa:LongQA",
    "ruler": "ruler:Ruler",
    "base-ability": "base_ability:BaseAbility",
}


@dataclass(frozen=True)
class Cell:
    """A compressor at a budget."""

    compressor: Compressor
    budget: Budget

    @property
    def name(self) -> str:
        return str(self.compressor)

    @property
    def label(self) -> str:
        return budget_label(self.budget)


@dataclass(kw_only=True)
class Protocol(ABC):
    """Settings of an evaluation. Fields are the options of its command and the keys of a sweep's entry."""

    name: ClassVar[str]
    shown: ClassVar[tuple[str, ...]] = ()
    """Figures of a row that the command prints, besides what the row is about."""

    models: list[str]
    """Hugging Face model folders, each as FOLDER or NAME=FOLDER."""
    out: str
    """Folder of the results; one that is there is gone on with."""
    limit: int | None = None
    """Items to measure, the first ones; None: all."""
    dtype: str = "float32"
    """Of weights and cache: float32, bfloat16, float16 or float64."""
    device: str = "auto"
    """As torch names it; "auto": CUDA where there is one."""
    threads: int | None = None
    """CPU threads; None: torch's own choice."""
    batch_size: int = 1
    """Items that go through the model together. Figures are the same at the same batch size."""
    seed: int = 0
    """Of everything that is drawn."""

    @abstractmethod
    def check(self) -> list[str]:
        """The plan, a line each; loads no weights.

        Raises:
            ValueError: on anything that would stop the run later; the message names the setting.
        """

    @abstractmethod
    def run(self) -> Path:
        """Measure what is missing and write OUT/results.json; returns its path."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Protocol:
        """The protocol with the given settings, as a YAML file or the command line holds them.

        Raises:
            ValueError: on an unknown setting, a missing one, or one of the wrong type.
        """
        hints = typing.get_type_hints(cls)
        fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
        for key in settings:
            if key not in fields:
                near = difflib.get_close_matches(str(key), fields, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(fields)}"
                raise ValueError(f"{key!r} is not a setting of {cls.name}; {hint}")
        for item in dataclasses.fields(cls):
            missing = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if missing and item.name not in settings:
                raise ValueError(f"{cls.name}: {item.name} is missing; give it")
        fitting = {key: fit(key, value, fields[key]) for key, value in settings.items()}
        for key, value in fitting.items():
            check_upper(key, value)
        return cls(**fitting)

    def check_common(self) -> list[ModelFolder]:
        """Check the shared settings; returns the models, which all have one tokenizer.

        Raises:
            ValueError: as `check`.
        """
        for name in ("batch_size", "limit", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: choose among {', '.join(DTYPES)}")
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise ValueError(f"out={self.out!r} is a file; give a folder")
        choose_device(self.device)
        return find_models(self.models)

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
        if len({f.tokenizer for f in facts.values()}) > 1:
            raise ValueError(
                f"models: {', '.join(facts)} have different tokenizers, so the same tokens mean different texts; evaluate"
                " them in runs of their own"
            )
        return {name: f.facts() for name, f in facts.items()}


@dataclass(kw_only=True)
class CompressionProtocol(Protocol):
    """A protocol that measures compressors at budgets."""

    compressors: list[str] = field(default_factory=lambda: ["attention-matching"])
    """Specifications; SPEC@KEEP measures that one at a budget of its own, e.g. int8@1."""
    keep: list[str] = field(default_factory=lambda: ["0.05", "0.1", "0.2", "0.4"])
    """Budgets: kept fractions (0.1), or kept slots per layer and KV head (76t)."""
    bos: str = "auto"
    """BOS before each text: auto (as the model's tokenizer puts it there by itself), always or never."""

    def check_common(self) -> list[ModelFolder]:
        IdRules(self.bos)
        return super().check_common()

    def settings(self, *names: str) -> dict[str, Any]:
        # "auto" is not said: results folders from before there was a choice go on.
        return super().settings(*names, *(["bos"] if self.bos != "auto" else []))

    def cells(self, length: int) -> list[Cell]:
        """Every compressor at every budget, in the order given, each once.

        Args:
            length: tokens of the shortest context.

        Raises:
            ValueError: on an unknown compressor or setting, or a budget that the compressor cannot keep to.
        """
        if not self.compressors:
            raise ValueError("compressors: give at least one, e.g. attention-matching")
        budgets = [parse_budget(x) for x in self.keep]
        cells: dict[tuple[str, str], Cell] = {}
        for text in self.compressors:
            specification, at, own = text.partition("@")
            if not at and not budgets:
                raise ValueError("keep: give at least one budget, e.g. 0.1")
            compressor = make(specification)
            for budget in [parse_budget(own)] if at else budgets:
                check_budget(compressor, budget, length)
                cell = Cell(compressor, budget)
                cells.setdefault((cell.name, cell.label), cell)
        return list(cells.values())


def fed_by_compressors(cells: list[Cell], length: int) -> Iterator[tuple[str, int]]:
    """Compressors that feed tokens behind a context of that length, and how many."""
    for cell in cells:
        if cell.budget.slots(length) < length and (tokens := cell.compressor.tokens_after(length)):
            yield f"compressor {cell.name}", tokens


def check_budget(compressor: Compressor, budget: Budget, length: int) -> None:
    """Refuse a budget that a compressor could not keep to on a context of that many tokens.

    Raises:
        ValueError: it keeps nothing, fewer slots than the compressor works with, or less than all where it drops none.
    """
    slots = budget.slots(length)
    if slots >= length:
        return
    if isinstance(compressor, Quantisation):
        raise ValueError(
            f"compressor {compressor}: keep {budget_label(budget)} drops slots, but quantisation drops none: write"
            f" {compressor}@1, or stack it on a selection, e.g. attention-matching+{compressor}"
        )
    if slots < compressor.smallest:
        raise ValueError(
            f"compressor {compressor}: keep {budget_label(budget)} of {length} tokens leaves {slots} slots, it needs"
            f" {compressor.smallest}; give a larger budget or smaller settings"
        )


def fit(name: str, value: Any, kind: Any) -> Any:
    """A setting's value as its type wants it: single values become lists, and commas part the words of a string.

    Raises:
        ValueError: when it does not fit.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if list[str] in kinds:
        values = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        if all(isinstance(x, (str, int, float)) and not isinstance(x, bool) for x in values):
            return [str(x).strip() for x in values if str(x).strip()]
    for one in kinds:
        if one is type(None) and value is None:
            return None
        if one is float and type(value) is int:
            return float(value)
        if type(value) is one:
            return value
    wanted = " or ".join(
        "nothing" if k is type(None) else "list" if k == list[str] else k.__name__ for k in kinds
    )
    raise ValueError(f"{name}={value!r}: must be {wanted}, is {type(value).__name__}")


def protocol_class(name: str) -> type[Protocol]:
    """The class of a protocol.

    Raises:
        ValueError: when there is none of that name.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(str(name), PROTOCOLS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(PROTOCOLS)}"
        raise ValueError(f"protocol {name!r}: no such protocol; {hint}")
    module, _, attribute = PROTOCOLS[name].partition(":")
    return getattr(importlib.import_module(f"kvcat_nemo.evaluate.{module}"), attribute)
