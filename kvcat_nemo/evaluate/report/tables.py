"""Tables that a page and a Markdown file both show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One cell; `better` marks a difference as good, bad or neither."""

    text: str
    better: bool | None = None

    @property
    def css(self) -> str:
        return "" if self.better is None else "better" if self.better else "worse"


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Inline SVG (or a shaded table) with a caption."""

    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Group:
    """Charts that stand side by side."""

    title: str
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Section:
    """One protocol's part of the page."""

    title: str
    text: Sequence[str] = ()
    groups: Sequence[Group] = ()
    tables: Sequence[Table] = field(default_factory=list)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a reader; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    return digits if abs(value) < 10 else max(digits - 1, 1) if abs(value) < 1000 else 0


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    """value ± standard error, both with the same decimals."""
    if value is None or not error or not math.isfinite(error):
        return number(value, digits)
    return f"{number(value, digits)} ± {error:,.{_decimals(value, digits)}f}"


def difference(value: float | None, error: float | None, *, lower_is_better: bool, digits: int = 3) -> Cell:
    """A signed difference, marked good or bad where it is larger than twice its standard error."""
    if value is None:
        return Cell("–")
    text = ("+" if value > 0 else "") + with_error(value, error, digits)
    clear = error is not None and abs(value) > 2 * error
    return Cell(text, (value < 0) == lower_is_better if clear else None)


def percent(keep: float) -> str:
    return f"{100 * keep:.3g} %"


def markdown(table: Table) -> str:
    """The table in Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    head = [line(table.columns), "|" + "---|" * len(table.columns)]
    body = [line([cell.text for cell in row]) for row in table.rows]
    title = [f"**{table.title}**", ""] if table.title else []
    note = ["", f"*{table.note}*"] if table.note else []
    return "\n".join([*title, *head, *body, *note])
