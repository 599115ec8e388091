"""Cells of an evaluation: every compressor at every budget, checked before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.kivi import Quantisation
from kvcat_nemo.compress.registry import make
from kvcat_nemo.evaluate.results import budget_label, parse_budget


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


def cells_of(specifications: list[str], keep: list[str], length: int) -> list[Cell]:
    """Every compressor at every budget, in the order given, each once.

    Args:
        specifications: of compressors; SPEC@KEEP has a budget of its own. keep: budgets of the others.
        length: tokens of the shortest context.

    Raises:
        ValueError: on an unknown compressor or setting, or a budget that the compressor cannot keep to.
    """
    if not specifications:
        raise ValueError("compressors: give at least one, e.g. attention-matching")
    budgets = [parse_budget(x) for x in keep]
    cells: dict[tuple[str, str], Cell] = {}
    for text in specifications:
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
