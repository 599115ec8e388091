"""From single runs to what can be said: mean and spread over seeds, and paired tests on windows against the control."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kvcat_nemo.evaluate.statistics import paired
from kvcat_nemo.runs.layout import METRICS_FILE
from kvcat_nemo.runs.metrics_file import MetricsFile

CONTROL = "none"


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (None for one) and the values."""
    values = list(values)
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
        "values": values,
    }


def training_figures(run: Path) -> dict[str, Any]:
    """A run's last validation and its course: tokens, keep rates, loss parts."""
    lines = MetricsFile.lines(run / "kvcat" / METRICS_FILE)
    train = [x for x in lines if x["kind"] == "train"]
    held = [x for x in lines if x["kind"] == "validation"]
    names = ("dense_ppl", "masked_ppl", "keep_rate", "loss/distill", "top1_agreement")
    tail = train[-max(len(train) // 10, 1) :]
    return {
        "steps": train[-1]["step"],
        "tokens": int(sum(x["tokens"] for x in train)),
        "hours": sum(x["step_seconds"] for x in train) / 3600,
        "before": {n: held[0][n] for n in names if n in held[0]},
        "after": {n: held[-1][n] for n in names if n in held[-1]},
        "keep_rate_last_tenth": {
            n: statistics.fmean(x[n] for x in tail) for n in tail[-1] if n.startswith("keep_rate")
        },
    }


def compare(rows: list[dict], groups: dict[str, list[str]], control: str = CONTROL) -> list[dict[str, Any]]:
    """Rows of a continuation's results, by group of models, compressor and budget.

    Args:
        rows: of `kvcat evaluate continuation`, one per model, compressor and budget, with figures per window.
        groups: group → its models, which differ in the seed.
        control: the group that others are compared with.

    Each row has `delta_ppl` and `kl` as `spread`s, and against the control: `difference` of the means; `beyond_seeds`,
    whether it exceeds twice the standard error that the spread over seeds gives (None without two seeds in both); and
    `p`, of the paired test over windows of the excess loss NLL(compressed) − NLL(dense), averaged over seeds.
    """
    cells: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if row["compressor"] != "none":
            cells.setdefault((row["compressor"], row["budget"]), {})[row["model"]] = row
    out = []
    for (compressor, _), by_model in cells.items():
        base = [by_model[m] for m in groups.get(control, []) if m in by_model]
        for group, models in groups.items():
            mine = [by_model[m] for m in models if m in by_model]
            if not mine:
                continue
            line = {
                "group": group,
                "compressor": compressor,
                "keep": mine[0]["keep"],
                "delta_ppl": spread(r["delta_ppl"] for r in mine),
                "kl": spread(r["kl"] for r in mine),
                "top1": spread(r["top1"] for r in mine),
                "ppl_dense": spread(r["ppl_dense"] for r in mine),
            }
            if base and group != control:
                line |= _against(mine, base)
            out.append(line)
    return out


def _against(mine: list[dict], base: list[dict]) -> dict[str, Any]:
    a, b = (spread(r["delta_ppl"] for r in side) for side in (base, mine))
    test = paired(_excess(base), _excess(mine))
    return {
        "difference": b["mean"] - a["mean"],
        "ratio": a["mean"] / b["mean"] if b["mean"] else None,
        "beyond_seeds": _beyond(a, b),
        "kl_beyond_seeds": _beyond(*(spread(r["kl"] for r in side) for side in (base, mine))),
        "by_seed": _by_seed(mine, base, "delta_ppl"),
        "kl_by_seed": _by_seed(mine, base, "kl"),
        "excess_loss_difference": test.difference,
        "excess_loss_se": test.standard_error,
        "p": test.p,
    }


def _beyond(a: dict[str, Any], b: dict[str, Any]) -> bool | None:
    """Whether two means differ by more than twice the standard error that their spreads give."""
    if a["sd"] is None or b["sd"] is None:
        return None
    return abs(b["mean"] - a["mean"]) > 2 * math.sqrt(a["sd"] ** 2 / a["n"] + b["sd"] ** 2 / b["n"])


def _by_seed(mine: list[dict], base: list[dict], name: str) -> dict[str, Any] | None:
    """`spread` of the differences between runs of one seed, which saw the same data in the same order."""
    control = {_seed(r["model"]): r[name] for r in base}
    seeds = [(_seed(r["model"]), r[name]) for r in mine]
    values = [value - control[seed] for seed, value in seeds if seed in control]
    return spread(values) if values else None


def _seed(model: str) -> str:
    """What a run's name ends in; the name itself of a model that has no seed, such as the base."""
    return model.rpartition("-seed")[2]


def _excess(rows: list[dict]) -> list[float]:
    each = [np.array(r["nll_by_window"]) - np.array(r["nll_dense_by_window"]) for r in rows]
    return np.mean(each, axis=0).tolist()


def measurable(rows: list[dict], model: str) -> list[dict[str, Any]]:
    """On one model: how much worse random eviction is than Attention Matching at each budget.

    Where the ratio is near 1 the model uses too little context for compressibility to be measured at all.
    """
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["model"] == model:
            found.setdefault(row["budget"], {})[row["compressor"].partition(":")[0]] = row["delta_ppl"]
    return [
        {"keep": budget, "random": v["random"], "attention-matching": v["attention-matching"],
         "ratio": v["random"] / v["attention-matching"] if v["attention-matching"] > 0 else None}
        for budget, v in found.items()
        if {"random", "attention-matching"} <= v.keys()
    ]  # fmt: skip


def dense(measured: dict[str, Any], groups: dict[str, list[str]], control: str = CONTROL) -> dict[str, Any]:
    """Perplexity over the full cache by group, and against the control: `percent` by seed, and `p` over windows.

    Args:
        measured: what benchmarks.study.dense wrote.
    """
    each = {name: facts["nll_by_window"] for name, facts in measured["models"].items()}
    perplexity = {name: math.exp(statistics.fmean(nll)) for name, nll in each.items()}
    base = {_seed(n): n for n in groups.get(control, []) if n in each}
    rows = {}
    for group, names in groups.items():
        there = [n for n in names if n in each]
        if not there:
            continue
        rows[group] = {"perplexity": spread(perplexity[n] for n in there)}
        pairs = [(base[_seed(n)], n) for n in there if _seed(n) in base and group != control]
        if pairs:
            rows[group]["percent"] = spread(100 * (perplexity[b] / perplexity[a] - 1) for a, b in pairs)
            before, after = (np.mean([each[pair[i]] for pair in pairs], axis=0).tolist() for i in (0, 1))
            rows[group]["p"] = paired(before, after).p
    return {**measured["settings"], "groups": rows}


def training_by_group(runs: Path, groups: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Perplexities and keep rates at the runs' ends, by group of runs that differ in the seed."""
    out: dict[str, dict[str, Any]] = {}
    for group, names in groups.items():
        found = [training_figures(runs / name) for name in names]
        line: dict[str, Any] = {"tokens": found[0]["tokens"], "hours": sum(r["hours"] for r in found)}
        for name in ("dense_ppl", "masked_ppl", "top1_agreement"):
            if name in found[0]["after"]:
                line[name] = spread(r["after"][name] for r in found)
                line[f"{name}_before"] = spread(r["before"][name] for r in found)
        if "keep_rate" in found[0]["keep_rate_last_tenth"]:
            line["keep_rate"] = spread(r["keep_rate_last_tenth"]["keep_rate"] for r in found)
            line["keep_rate_by_router"] = [
                [v for k, v in sorted(r["keep_rate_last_tenth"].items()) if "/" in k] for r in found
            ]
        out[group] = line
    return out


def gradient_curves(rows: list[dict], groups: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Curves of optimised caches, by budget and group: ends, the mean curve, and the speed-up to the control's end.

    The target is the mean of the control's final ΔPPL over its seeds; a run's speed-up is the control's number of steps
    over the first step at which that run's curve is at or below it, None when it never is.
    """
    out = []
    for budget in dict.fromkeys(r["budget"] for r in rows):
        control = [r for r in rows if r["budget"] == budget and r["model"] in groups.get(CONTROL, [])]
        target = statistics.fmean(r["delta_ppl"] for r in control) if control else None
        for group, names in groups.items():
            mine = [r for r in rows if r["budget"] == budget and r["model"] in names]
            if not mine:
                continue
            speeds = []
            for r in mine:
                pairs = zip(r["step"], r["delta_ppl_by_step"], strict=True)
                reached = next((s for s, v in pairs if target is not None and v <= target), None)
                speeds.append(r["steps"] / reached if reached else None)
            out.append(
                {
                    "group": group,
                    "keep": mine[0]["keep"],
                    "start": spread(r["delta_ppl_start"] for r in mine),
                    "end": spread(r["delta_ppl"] for r in mine),
                    "target": target,
                    "speed_up": speeds,
                    "step": mine[0]["step"],
                    "curve": np.mean([r["delta_ppl_by_step"] for r in mine], axis=0).tolist(),
                }
            )
    return out


def needle(rows: list[dict], groups: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Accuracy over all depths, in percent, by compressor, budget and group."""
    out = []
    cells = dict.fromkeys((r["compressor"], r["budget"]) for r in rows)
    for compressor, budget in cells:
        for group, names in groups.items():
            mine = [
                r
                for r in rows
                if (r["compressor"], r["budget"]) == (compressor, budget)
                and r["model"] in names
                and r["depth"] == "all"
            ]
            if mine:
                out.append(
                    {
                        "group": group,
                        "compressor": compressor,
                        "keep": mine[0]["keep"],
                        "accuracy": spread(r["accuracy"] for r in mine),
                        "nll": spread(r["nll"] for r in mine),
                    }
                )
    return out
