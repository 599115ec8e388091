"""Continuation results as charts and tables."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import numpy as np

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
from kvcat_nemo.evaluate.statistics import jackknife

METRICS = (
    (
        "delta_ppl",
        "ΔPPL",
        "perplexity over the compressed cache minus perplexity over the full one; lower is better",
    ),
    ("kl", "KL, nats", "KL(dense ‖ compressed) per token; lower is better"),
    ("top1", "top-1 agreement, %", "tokens whose likeliest next token stays the same; higher is better"),
)
NONE = "none"
ATTENTION_MATCHING = "attention-matching"


def build(rows: list[dict[str, Any]]) -> Section:
    """The section of continuation rows, of one or of several models."""
    compressed = [row for row in rows if row["compressor"] != NONE]
    models = list(dict.fromkeys(row["model"] for row in rows))
    compressors = list(dict.fromkeys(row["compressor"] for row in compressed))
    first = compressed[0] if compressed else rows[0]
    text = [
        f"{first['windows']} windows of text; of each the first {first['slots_full']} tokens' cache is compressed and"
        f" {first['predictions'] // first['windows']} predictions after it are scored. Error bars are one standard error"
        " over windows. 100 % is the full cache."
    ]
    groups = [_by_compressor(model, compressed, compressors) for model in models]
    if len(models) > 1:
        groups.append(_by_model(compressed, models, compressors))
    tables = [_figures(rows)]
    tables += [_before_after(compressed, models[0], other) for other in models[1:]]
    if any(name.startswith(ATTENTION_MATCHING) for name in compressors):
        tables.append(_paper(compressed, models))
    return Section("Compressed-prefix continuation", text, [g for g in groups if g.charts], tables)


def _line(rows: list[dict], metric: str) -> list[Point]:
    points = [
        Point(row["keep"], value, row.get(f"{metric}_se") or 0.0)
        for row in rows
        if (value := row.get(metric)) is not None and math.isfinite(value)
    ]
    return sorted(points, key=lambda p: p.x)


def _chart(series: list[Series], metric: tuple[str, str, str], ticks: list[float]) -> list[Chart]:
    series = [s for s in series if s.points]
    if not series:
        return []
    _, label, caption = metric
    svg = line_chart(
        series, x_label="kept slots", y_label=label, x_ticks=ticks, x_log=len(ticks) > 1, x_format=percent
    )
    return [Chart(svg, caption)]


def _ticks(rows: list[dict]) -> list[float]:
    return sorted({row["keep"] for row in rows})


def _by_compressor(model: str, rows: list[dict], compressors: list[str]) -> Group:
    rows = [row for row in rows if row["model"] == model]
    charts = []
    for metric in METRICS:
        series = [
            Series(name, _line([r for r in rows if r["compressor"] == name], metric[0]), colour=i)
            for i, name in enumerate(compressors)
        ]
        charts += _chart(series, metric, _ticks(rows))
    return Group(model, charts)


def _by_model(rows: list[dict], models: list[str], compressors: list[str]) -> Group:
    charts = []
    for name in compressors:
        mine = [row for row in rows if row["compressor"] == name]
        series = [
            Series(model, _line([r for r in mine if r["model"] == model], "delta_ppl"), colour=i)
            for i, model in enumerate(models)
        ]
        charts += _chart(series, ("delta_ppl", "ΔPPL", f"under {name}"), _ticks(mine))
    return Group("Models side by side", charts)


def _figures(rows: list[dict]) -> Table:
    lines = []
    for row in rows:
        full = row["compressor"] == NONE
        lines.append(
            [
                Cell(row["model"]),
                Cell("full cache" if full else row["compressor"]),
                Cell(percent(row["keep"])),
                Cell(f"{row['slots']:.1f}"),
                Cell(f"{row['bytes'] / 2**20:.2f}"),
                Cell(number(row["ppl_dense"], 2)),
                Cell("–" if full else with_error(row["delta_ppl"], row.get("delta_ppl_se"))),
                Cell("–" if full else with_error(row["kl"], row.get("kl_se"), 4)),
                Cell("–" if full else with_error(row["top1"], row.get("top1_se"), 1)),
                Cell(number(row.get("seconds"), 2)),
            ]
        )
    columns = ("model", "compressor", "keep", "slots", "MiB", "PPL dense", "ΔPPL", "KL", "top-1 %", "s")
    note = "slots: kept per layer and KV head; MiB: the cache; s: compressing one window."
    return Table(columns, lines, "All figures", note)


def _before_after(rows: list[dict], base: str, other: str) -> Table:
    """ΔPPL of two models on the same windows, with the standard error of their difference."""
    lines = []
    for key, pair in groupby(
        sorted(rows, key=lambda r: (r["compressor"], r["keep"])), lambda r: (r["compressor"], r["keep"])
    ):
        found = {row["model"]: row for row in pair}
        if not {base, other} <= found.keys():
            continue
        a, b = found[base], found[other]
        change = b["delta_ppl"] - a["delta_ppl"]
        lines.append(
            [
                Cell(f"{key[0]} at {percent(key[1])}"),
                Cell(with_error(a["delta_ppl"], a.get("delta_ppl_se"))),
                Cell(with_error(b["delta_ppl"], b.get("delta_ppl_se"))),
                difference(change, _paired_error(a, b), lower_is_better=True),
                Cell(number(a["delta_ppl"] / b["delta_ppl"], 2) if b["delta_ppl"] > 0 else "–"),
            ]
        )
    columns = ("compressor", base, other, "difference (paired)", "ratio")
    note = "ΔPPL; the difference's standard error is over windows, paired. Coloured where it exceeds two of them."
    return Table(columns, lines, f"{base} → {other}", note)


def _paired_error(a: dict, b: dict) -> float | None:
    parts = [
        np.array(row[name], dtype=np.float64)
        for row in (a, b)
        for name in ("nll_by_window", "nll_dense_by_window")
    ]
    if len({len(x) for x in parts}) != 1 or len(parts[0]) < 2:
        return None

    def change(i) -> float:
        na, da, nb, db = (np.exp(x[i].mean()) for x in parts)
        return float((nb - db) - (na - da))

    return jackknife(change, len(parts[0]))


def _paper(rows: list[dict], models: list[str]) -> Table:
    """The paper's ΔPPL under Attention Matching beside ours, first model → last one."""
    name = next(r["compressor"] for r in rows if r["compressor"].startswith(ATTENTION_MATCHING))
    ours = {(r["model"], round(r["keep"], 4)): r["delta_ppl"] for r in rows if r["compressor"] == name}
    lines = []
    for keep in sorted({k for table in paper.CONTINUATION_DELTA_PPL.values() for k in table}):
        values = [ours.get((model, keep)) for model in dict.fromkeys([models[0], models[-1]])]
        shown = " → ".join(number(v) for v in values) if any(v is not None for v in values) else "–"
        theirs = [
            " → ".join(number(v) for v in table[keep]) if keep in table else "–"
            for table in paper.CONTINUATION_DELTA_PPL.values()
        ]
        lines.append([Cell(percent(keep)), Cell(shown), *map(Cell, theirs)])
    columns = ("keep", "here", *(f"paper, Qwen2.5-{size}" for size in paper.CONTINUATION_DELTA_PPL))
    note = (
        "Base → KV-CAT. Same protocol; other models, other text, far more training tokens there: compare direction and ratio,"
        " not values."
    )
    return Table(columns, lines, "ΔPPL under Attention Matching, beside the paper's", note)
