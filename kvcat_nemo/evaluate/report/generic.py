"""Any protocol's rows as a table: the figures that every row has."""

from __future__ import annotations

from typing import Any

from kvcat_nemo.evaluate.report.tables import Cell, Section, Table, number, with_error


def build(protocol: str, rows: list[dict[str, Any]]) -> Section:
    """A section with one table; lists and nested values are left to the results file."""
    columns = [
        key
        for key in rows[0]
        if not key.endswith("_se") and not any(isinstance(row.get(key), (list, dict)) for row in rows)
    ]
    lines = [[_cell(row, key) for key in columns] for row in rows]
    return Section(protocol.replace("-", " ").capitalize(), tables=[Table(columns, lines)])


def _cell(row: dict[str, Any], key: str) -> Cell:
    value = row.get(key)
    if isinstance(value, float):
        return Cell(with_error(value, row.get(f"{key}_se")))
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    return Cell(number(None) if value is None else str(value))
