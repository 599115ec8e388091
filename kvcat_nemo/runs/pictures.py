"""A picture of a run's figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_run(lines: Sequence[dict[str, Any]], path: Path, *, title: str, target_keep: float | None) -> None:
    """Loss parts, keep rate per router and held-out perplexity over steps, as a PNG.

    Args:
        lines: a run's metrics.jsonl, parsed.
        target_keep: ρ, drawn as a line; None where masks have no such target (mask_span=prefix).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [x for x in lines if x["kind"] == "train"]
    held = [x for x in lines if x["kind"] == "validation"]
    figure, (losses, keep, ppl) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    figure.suptitle(title)

    steps = [x["step"] for x in train]
    for name, label in (
        ("anchor", "anchor: CE of the dense pass"),
        ("distill", "distill: KL(dense ‖ masked)"),
        ("budget", "budget"),
    ):
        if train and f"loss/{name}" in train[0]:
            losses.plot(steps, [x[f"loss/{name}"] for x in train], label=label)
    losses.set(title="Loss parts, unweighted (training)", xlabel="step", ylabel="nats per token")
    losses.legend(loc="upper right", fontsize="small", framealpha=0.6)

    groups = sorted(k for k in (train[0] if train else {}) if k.startswith("keep_rate/"))
    for name in groups:
        keep.plot(
            steps,
            [x[name] for x in train],
            label=f"group {name.removeprefix('keep_rate/group')}",
            linewidth=1,
        )
    if groups:
        keep.plot(steps, [x["keep_rate"] for x in train], color="black", label="mean")
        if target_keep is not None:
            keep.axhline(target_keep, color="grey", linestyle="--", label=f"target {target_keep:g}")
        keep.legend(loc="lower center", ncols=3, fontsize="small", framealpha=0.6)
    of = "all KV slots" if target_keep is not None else "KV slots before a cut"
    keep.set(title="Keep rate (training)", xlabel="step", ylabel=f"kept / {of}", ylim=(0, 1.02))

    for name, label in (("masked_ppl", "masked"), ("dense_ppl", "dense")):
        points = [(x["step"], x[name]) for x in held if name in x]
        if points:
            ppl.plot(*zip(*points, strict=True), marker="o", label=label)
    ppl.set(title="Held-out perplexity", xlabel="step", yscale="log")
    ppl.legend()

    for axes in (losses, keep, ppl):
        axes.xaxis.get_major_locator().set_params(integer=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)
