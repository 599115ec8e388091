"""From a scale's results to its JSON, pictures and the page; runs that are not there are named as such."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.study import dense, masks, pictures, summary
from benchmarks.study import jobs as plans
from benchmarks.study.measure import rows
from benchmarks.study.page import write_page
from benchmarks.study.pool import ROOT
from benchmarks.study.scales import SCALES
from kvcat_nemo.runs.layout import METRICS_FILE
from kvcat_nemo.runs.metrics_file import MetricsFile, write_atomically
from kvcat_nemo.runs.provenance import manifest

RESULTS = ROOT / "benchmarks" / "study"
EVIDENCE = ROOT / "docs" / "evidence.md"


def groups(jobs: list[plans.Job]) -> dict[str, list[str]]:
    """Group → names of its runs."""
    out: dict[str, list[str]] = {}
    for job in jobs:
        out.setdefault(job.group, []).append(job.name)
    return out


def make_report(study) -> dict[str, Any]:
    """Everything that the page shows of a scale, with manifest.

    Args:
        study: benchmarks.study.__main__.Study.
    """
    scale, out = study.scale, study.out
    policies, planned = study.done(plans.policy_jobs(scale)), plans.ablation_jobs(scale)
    ablations = study.done(planned)
    measured = [
        row
        for i, sweep in enumerate(scale.evaluation.sweeps)
        for row in rows(out / f"continuation{i}" / "results.json")
        if row["compressor"] == "none"
        or (row["compressor"] in sweep.compressors and row["budget"] in sweep.keep)
    ]
    base: dict[str, Any] = {
        "model": scale.model,
        "parameters": scale.shape.parameters,
        "vocabulary": scale.shape.vocabulary,
        "window": scale.shape.tokens,
    }
    if scale.model is None:
        base["training"] = summary.training_figures(out / "base")
    full_cache = out / dense.FILE
    data = json.loads((study.data / "manifest.json").read_text())
    return {
        "scale": scale.name,
        "evidence": scale.evidence,
        "base": base,
        "measurable": summary.measurable(measured, "base"),
        "policies_not_run": sorted({*scale.seeds} - {j.group for j in policies}),
        "training": summary.training_by_group(out / "runs", groups(policies)),
        "dense": summary.dense(json.loads(full_cache.read_text()), {"base": ["base"]} | groups(policies))
        if full_cache.is_file()
        else None,
        "continuation": summary.compare(measured, {"base": ["base"]} | groups(policies)),
        "gradient": summary.gradient_curves(rows(out / "gradient" / "results.json"), groups(policies)),
        "needle": summary.needle(
            rows(out / "needle" / "results.json"), {"base": ["base"]} | groups(policies)
        ),
        "masks": _masks(study, policies),
        "ablations": {
            "training": summary.training_by_group(out / "runs", groups(ablations)),
            "continuation": summary.compare(
                rows(out / "ablations" / "results.json"), groups(ablations), "ablation: default"
            ),
            "not_run": sorted({j.group for j in planned} - {j.group for j in ablations}),
        },
        "manifest": manifest(
            scale=dataclasses.asdict(scale),
            data={"fingerprint": data["source"]["fingerprint"], "splits": data["splits"]},
            seeds={k: list(v) for k, v in scale.seeds.items()},
        ),
    }


def _pieces(study) -> list[str]:
    """Text of every token id."""
    from kvcat_nemo.tokens import load, text_of

    tokenizer = load(study.tokenizer)
    return [text_of(tokenizer, [i]) for i in range(len(tokenizer))]


def _masks(study, policies: list[plans.Job]) -> dict[str, Any]:
    """By run, of the runs with routers."""
    found = {j.name: study.out / "runs" / j.name / masks.FILE for j in policies}
    found = {name: path for name, path in found.items() if path.is_file()}
    if not found:
        return {}
    pieces = _pieces(study)
    return {name: masks.structure(path, pieces) for name, path in found.items()}


def write_report(study) -> list[Path]:
    """Write the results' JSON, the pictures and the page; what is no evidence stays in the study's folder."""
    report = make_report(study)
    scale = study.scale
    home = RESULTS if scale.evidence else study.out
    results = home / (f"{scale.name}.json" if scale.evidence else "results.json")
    write_atomically(results, json.dumps(report, indent=1) + "\n")
    page = EVIDENCE if scale.evidence else study.out / "evidence.md"
    images = page.parent / "img"
    images.mkdir(exist_ok=True)
    written = _pictures(study, report, images)
    reports = [report]
    if scale.evidence:
        known = [RESULTS / f"{s.name}.json" for s in SCALES.values() if s.evidence]
        reports = [json.loads(path.read_text()) for path in known if path.is_file()]
    conclusions = RESULTS / "conclusions.md"
    words = conclusions.read_text("utf-8") if scale.evidence and conclusions.is_file() else ""
    return [results, *written, write_page(reports, page, evidence_page=EVIDENCE, conclusions=words)]


def _pictures(study, report: dict[str, Any], images: Path) -> list[Path]:
    runs = study.out / "runs"
    name = lambda what: images / f"study-{report['scale']}-{what}.png"  # noqa: E731
    written = []
    if report["continuation"]:
        written.append(pictures.continuation(report["continuation"], name("continuation")))
    if report["gradient"]:
        written.append(pictures.gradient(report["gradient"], name("gradient")))
    lines = {
        job.name: MetricsFile.lines(runs / job.name / "kvcat" / METRICS_FILE)
        for job in study.done(plans.policy_jobs(study.scale))
        if job.group == "router"
    }
    if lines:
        written.append(pictures.health(lines, name("health"), study.scale))
        recorded = runs / next(iter(lines)) / masks.FILE
        if recorded.is_file():
            written.append(pictures.masks(recorded, _pieces(study), name("masks")))
    return written
