"""The report of a training run: table, JSON with manifest, picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from kvcat_nemo.method.config import keep_target
from kvcat_nemo.runs.layout import LOSSES_PICTURE, RunFolder, read_record
from kvcat_nemo.runs.pictures import plot_run
from kvcat_nemo.runs.provenance import manifest
from kvcat_nemo.tracking.mlflow_run import client_of, store_uri


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics file.

    Raises:
        ValueError: when the run has no validation before its first step and after its last.
    """
    path = RunFolder(run).metrics
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = max((x["step"] for x in lines if x["kind"] == "train"), default=0)
    validated = {x["step"] for x in lines if x["kind"] == "validation"}
    if not steps or not {0, steps} <= validated:
        raise ValueError(
            f"{path}: no validation at step 0 and at the last step, {steps}; was the run finished?"
        )
    return lines


def write(
    run: Path, data: Path, out: Path, *, stage_seconds: dict[str, float], peak_of_children: int = 0
) -> dict[str, Any]:
    """Write out/report.json and out/losses.png for a finished run.

    Args:
        run: the run's folder; data: the dataset's folder; stage_seconds: time of each stage by name.
        peak_of_children: largest resident set of any stage's process, bytes.
    """
    lines = read_metrics(run)
    train = [x for x in lines if x["kind"] == "train"]
    held = {x["step"]: x for x in lines if x["kind"] == "validation"}
    before, after = held[0], held[train[-1]["step"]]
    config = read_record(RunFolder(run).config)
    dataset = json.loads((data / "manifest.json").read_text())
    seconds = sum(x["step_seconds"] for x in train)

    def both(name: str) -> dict[str, float]:
        return {"before": before[name], "after": after[name]}

    kvcat = config["model"]["kvcat"]
    result = {
        "dense_ppl": both("dense_ppl"),
        "masked_ppl": both("masked_ppl"),
        "keep_rate": after["keep_rate"],
        "keep_rate_before": before["keep_rate"],
        "top1_agreement": both("top1_agreement"),
        "kl_teacher_student": both("loss/distill"),
        "tokens_per_second": sum(x["tokens"] for x in train) / seconds,
        "peak_memory_bytes": int(max(peak_of_children, *(x["peak_memory_bytes"] for x in train))),
        "steps": len(train),
        "tokens": int(sum(x["tokens"] for x in train)),
        "held_out_tokens": int(after["tokens"]),
        "seconds": {"training": seconds, **stage_seconds},
        "manifest": manifest(
            config=config,
            seeds={"data": config["data"]["seed"], "kvcat": kvcat["seed"]},
            data={
                "fingerprint": dataset["source"]["fingerprint"],
                "tokenizer": dataset["tokenizer"]["fingerprint"],
                "splits": dataset["splits"],
            },
        ),
    }
    title = f"KV-CAT on {config['data']['base'] or 'a fresh model'}: {result['tokens']:,} tokens in {result['steps']} steps"
    plot_run(lines, out / LOSSES_PICTURE, title=title, target_keep=keep_target(kvcat))
    temporary = out / f".report.{os.getpid()}"
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, out / "report.json")
    return result


def table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    dense, masked = report["dense_ppl"], report["masked_ppl"]
    agreement, kl = report["top1_agreement"], report["kl_teacher_student"]
    rows = [
        ("", "before", "after", "change"),
        (
            "dense held-out perplexity",
            f"{dense['before']:.2f}",
            f"{dense['after']:.2f}",
            f"{100 * (dense['after'] / dense['before'] - 1):+.1f} %",
        ),
        (
            "masked held-out perplexity",
            f"{masked['before']:.2f}",
            f"{masked['after']:.2f}",
            f"{100 * (masked['after'] / masked['before'] - 1):+.1f} %",
        ),
        ("KL(dense ‖ masked), nats", f"{kl['before']:.3f}", f"{kl['after']:.3f}", ""),
        ("dense and masked agree, top 1", f"{agreement['before']:.3f}", f"{agreement['after']:.3f}", ""),
        (
            "keep rate of the masked pass",
            f"{report['keep_rate_before']:.3f}",
            f"{report['keep_rate']:.3f}",
            "",
        ),
    ]
    lines = ["", *(f"  {name:<31}{a:>10}{b:>10}{c:>11}" for name, a, b, c in rows), ""]
    lines.append(
        f"  {report['steps']} steps, {report['tokens']:,} tokens, {report['tokens_per_second']:.0f} tokens/s (each passes twice), "
        f"peak memory {report['peak_memory_bytes'] / 1e9:.1f} GB"
    )
    return "\n".join(lines)


def attach_to_mlflow(run: Path, out: Path) -> None:
    """Add report and picture to the run's artifacts, and its headline figures to the run."""
    run_id = read_record(RunFolder(run).mlflow_run)["run_id"]
    client = client_of(store_uri())
    for name in ("report.json", LOSSES_PICTURE, "sample.json"):
        client.log_artifact(run_id, str(out / name))
    report = json.loads((out / "report.json").read_text())
    for name in ("dense_ppl", "masked_ppl"):
        for when, value in report[name].items():
            client.log_metric(run_id, f"report/{name}_{when}", value)
