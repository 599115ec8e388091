"""Needle, RULER-style and long-document results: quality against budget, and the needle's heat map."""

from __future__ import annotations

import math
from typing import Any

from kvcat_nemo.evaluate.report import paper
from kvcat_nemo.evaluate.report.charts import Point, Series, heat_map, line_chart
from kvcat_nemo.evaluate.report.tables import Cell, Chart, Group, Section, Table, percent, with_error

NONE = "none"
# figure → label of its axis, the first that a row has is the headline.
FIGURES = {
    "balanced_accuracy": "balanced accuracy, %",
    "accuracy": "accuracy, %",
    "f1": "F1, %",
}
_ALL = ("all", "average")


def needle(rows: list[dict[str, Any]]) -> Section:
    """Curves over all depths, and a heat map of depth × budget for each model, compressor and length."""
    section = _section("Needle in a haystack", rows, by=("length",), of_all="depth")
    groups = [*section.groups, *_maps(rows)]
    return Section(section.title, section.text, groups, [*section.tables, _needle_paper()])


def ruler(rows: list[dict[str, Any]]) -> Section:
    """A chart per task and length, the average first."""
    return _section("RULER-style tasks", rows, by=("task", "length"))


def long_qa(rows: list[dict[str, Any]]) -> Section:
    """A chart per difficulty, where there are several."""
    return _section("Questions about long documents", rows, by=("difficulty",))


def _known(rows: list[dict]) -> str:
    aware = {bool(row["question_aware"]) for row in rows}
    told = {
        frozenset({False}): "The compressor never saw the question.",
        frozenset({True}): "The compressor saw the question.",
    }
    return told.get(frozenset(aware), "Rows tell whether the compressor saw the question.")


def _section(title: str, rows: list[dict], *, by: tuple[str, ...], of_all: str | None = None) -> Section:
    figure = next(name for name in FIGURES if name in rows[0])
    drawn = [row for row in rows if of_all is None or row.get(of_all) in _ALL]
    parts: dict[tuple, list[dict]] = {}
    for row in drawn:
        parts.setdefault(tuple(row.get(name) for name in by), []).append(row)
    order = sorted(parts, key=lambda key: (key[0] not in _ALL, [str(x) for x in key]))
    charts = [_chart(parts[key], figure, _caption(by, key)) for key in order]
    several = len({bool(row["question_aware"]) for row in rows}) > 1
    columns = [*(n for n in (*by, of_all) if n and any(n in row for row in rows)), *["question"] * several]
    text = [f"{_known(rows)} Error bars are one standard error. 100 % is the full cache."]
    return Section(title, text, [Group("", charts)], [_table(rows, figure, columns)])


def _caption(names: tuple[str, ...], key: tuple) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(names, key, strict=True) if value is not None)


def _chart(rows: list[dict], figure: str, caption: str) -> Chart:
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple, list[Point]] = {}
    for row in rows:
        if row.get(figure) is not None and math.isfinite(row[figure]):
            aware = ", question known" if row["question_aware"] else ""
            point = Point(row["keep"], row[figure], row.get(f"{figure}_se") or 0.0)
            lines.setdefault((row["model"], row["compressor"], aware), []).append(point)
    series = []
    for model, compressor, aware in lines:
        if compressor == NONE:
            continue
        full = lines.get((model, NONE, aware), [])  # every curve ends at the full cache
        name = f"{compressor}{aware}" if len(models) == 1 else f"{model}: {compressor}{aware}"
        series.append(Series(name, [*lines[model, compressor, aware], *full]))
    if not series:
        series = [Series(model, points) for (model, _, _), points in lines.items()]
    ticks = sorted({p.x for s in series for p in s.points})
    svg = line_chart(
        series,
        x_label="kept slots",
        y_label=FIGURES[figure],
        x_ticks=ticks,
        x_log=len(ticks) > 1,
        x_format=percent,
    )
    return Chart(svg, caption)


def _table(rows: list[dict], figure: str, columns: list[str]) -> Table:
    lines = []
    for row in rows:
        known = {"question": "known" if row["question_aware"] else "unknown"}
        lines.append(
            [
                Cell(row["model"]),
                Cell("full cache" if row["compressor"] == NONE else row["compressor"]),
                Cell(percent(row["keep"])),
                *(Cell(str({**row, **known}.get(name, "–"))) for name in columns),
                Cell(with_error(row.get(figure), row.get(f"{figure}_se"), 1)),
                Cell(with_error(row.get("nll"), row.get("nll_se"))),
                Cell(f"{row['slots']:.1f}"),
                Cell(str(row["items"])),
            ]
        )
    head = (
        "model",
        "compressor",
        "keep",
        *columns,
        FIGURES[figure],
        "NLL of the answer",
        "slots",
        "questions",
    )
    return Table(head, lines, "All figures")


def _maps(rows: list[dict]) -> list[Group]:
    """Depth × budget, shaded by accuracy."""
    parts: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["compressor"] != NONE and row["depth"] not in _ALL:
            parts.setdefault((row["model"], row["compressor"], row["length"]), []).append(row)
    charts = []
    for (model, compressor, length), mine in parts.items():
        keeps, depths = sorted({r["keep"] for r in mine}), sorted({r["depth"] for r in mine})
        found = {(r["depth"], r["keep"]): r["accuracy"] / 100 for r in mine}
        values = [[found.get((depth, keep)) for keep in keeps] for depth in depths]
        shaded = heat_map(
            [f"{depth:g}" for depth in depths], [percent(k) for k in keeps], values, corner="depth"
        )
        charts.append(Chart(shaded, f"{model}, {compressor}, {length} tokens: keys found, %"))
    return [Group("Depth × budget", charts)] if charts else []


def _needle_paper() -> Table:
    keeps = sorted({keep for table in paper.NEEDLE.values() for keep in table})
    lines = [
        [
            Cell(f"Qwen2.5-{size}"),
            *(Cell(" → ".join(map(str, table[k])) if k in table else "–") for k in keeps),
        ]
        for size, table in paper.NEEDLE.items()
    ]
    note = "Base → KV-CAT, 1024 tokens, Attention Matching; other models and far more training tokens than any here."
    return Table(("accuracy, %", *map(percent, keeps)), lines, "The paper's", note)
