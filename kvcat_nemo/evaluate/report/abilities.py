"""Base ability before and after, and curves of gradient optimisation."""

from __future__ import annotations

import math
from typing import Any

from kvcat_nemo.evaluate.report import paper
from kvcat_nemo.evaluate.report.charts import Point, Series, line_chart
from kvcat_nemo.evaluate.report.tables import (
    Cell,
    Chart,
    Group,
    Section,
    Table,
    difference,
    number,
    percent,
    with_error,
)


def base_ability(rows: list[dict[str, Any]]) -> Section:
    """Accuracy by task and model, with the paired difference to the first model, the paper's beside it."""
    accuracy = {(row["task"], row["model"]): row for row in rows if "accuracy" in row}
    change = {(row["task"], row["model"]): row for row in rows if "difference" in row}
    tasks = list(dict.fromkeys(task for task, _ in accuracy))
    models = list(dict.fromkeys(model for _, model in accuracy))
    lines = []
    for task in tasks:
        line = [Cell(task), Cell(str(accuracy[task, models[0]]["n"]))]
        for model in models:
            row = accuracy.get((task, model), {})
            line.append(Cell(with_error(row.get("accuracy"), row.get("accuracy_se"), 1)))
            if model != models[0]:
                row = change.get((task, model), {})
                line.append(
                    difference(
                        row.get("difference"), row.get("difference_se"), lower_is_better=False, digits=1
                    )
                )
        theirs = paper.BASE_ABILITY.get("mean" if task == "average" else task)
        lines.append([*line, Cell(" → ".join(map(str, theirs)) if theirs else "–")])
    columns = ["task", "items", models[0]]
    for model in models[1:]:
        columns += [model, "difference (paired)"]
    note = "Accuracy in %, zero-shot, lm-evaluation-harness. The paper's: Qwen2.5-0.5B, base → KV-CAT."
    table = Table([*columns, "paper"], lines, note=note)
    return Section("Base ability", tables=[table])


def gradient(rows: list[dict[str, Any]]) -> Section:
    """ΔPPL per step of a cache trained by gradient, models side by side."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    charts = []
    for compressor, keep in dict.fromkeys((row["compressor"], row["keep"]) for row in rows):
        mine = [row for row in rows if (row["compressor"], row["keep"]) == (compressor, keep)]
        series = []
        for row in mine:
            points = [
                Point(step, value)
                for step, value in zip(row["step"], row["delta_ppl_by_step"], strict=True)
                if math.isfinite(value)
            ]
            series.append(Series(row["model"], points, colour=models.index(row["model"])))
        svg = line_chart(series, x_label="step", y_label="ΔPPL", markers=False)
        charts.append(Chart(svg, f"{compressor} at {percent(keep)}"))
    lines = [
        [
            Cell(row["model"]),
            Cell(row["compressor"]),
            Cell(percent(row["keep"])),
            Cell(number(row["delta_ppl_start"])),
            Cell(with_error(row["delta_ppl"], row.get("delta_ppl_se"))),
            Cell(str(row["steps"])),
            Cell(str(row["reached_at"]) if row.get("reached_at") is not None else "–"),
            Cell(f"{row['speed_up']:.2f} ×" if row.get("speed_up") else "–"),
        ]
        for row in rows
    ]
    columns = ("model", "start", "keep", "ΔPPL at first", "ΔPPL at last", "steps", "reached at", "speed-up")
    note = (
        f"Reached at: the step at which a model has {models[0]}'s last ΔPPL. The paper's 'up to 5 ×' is this."
    )
    return Section(
        "Gradient optimisation of the cache", [], [Group("", charts)], [Table(columns, lines, note=note)]
    )
