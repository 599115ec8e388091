"""The study's pictures: compressibility by policy and budget, gradient curves, health of the routers' training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.scales import Scale
from kvcat_nemo.common.files import new_file

COLOURS = {
    "base": "0.55",
    "none": "tab:blue",
    "random": "tab:orange",
    "attention": "tab:green",
    "router": "tab:red",
}


def _figure(columns: int, rows: int = 1, height: float = 4.2):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(5 * columns, height * rows), layout="constrained", squeeze=False
    )


def _write(figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return path


def continuation(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """ΔPPL over the kept fraction, a panel per compressor; bars are standard deviations over seeds."""
    names = list(dict.fromkeys(r["compressor"] for r in rows))
    columns = min(len(names), 3)
    figure, axes = _figure(columns, -(-len(names) // columns))
    for panel, name in zip(axes.flat, names, strict=False):
        for group in dict.fromkeys(r["group"] for r in rows):
            points = sorted(
                (100 * r["keep"], r["delta_ppl"]["mean"], r["delta_ppl"]["sd"] or 0.0)
                for r in rows
                if r["compressor"] == name and r["group"] == group
            )
            if points:
                x, y, error = zip(*points, strict=True)
                panel.errorbar(x, y, yerr=error, marker="o", capsize=3, label=group, color=COLOURS.get(group))
        panel.set(title=name, xlabel="kept, %", ylabel="ΔPPL", xscale="log")
        panel.axhline(0, color="0.8", linewidth=1)
        panel.set_xticks(
            sorted({100 * r["keep"] for r in rows}),
            [f"{k:g}" for k in sorted({100 * r["keep"] for r in rows})],
        )
        panel.minorticks_off()
        panel.legend(fontsize="small")
    for panel in axes.flat[len(names) :]:
        panel.axis("off")
    return _write(figure, path)


def gradient(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """ΔPPL over steps of Adam on the kept slots, a panel per budget; means over seeds."""
    budgets = list(dict.fromkeys(r["keep"] for r in rows))
    figure, axes = _figure(len(budgets))
    for panel, budget in zip(axes.flat, budgets, strict=True):
        for r in (r for r in rows if r["keep"] == budget):
            panel.plot(r["step"], r["curve"], label=r["group"], color=COLOURS.get(r["group"]))
        panel.set(
            title=f"{100 * budget:.3g} % kept",
            xlabel="step of Adam on the cache",
            ylabel="ΔPPL",
        )
        panel.legend(fontsize="small")
    return _write(figure, path)


def health(runs: dict[str, list[dict[str, Any]]], path: Path, scale: Scale) -> Path:
    """A row per run: loss parts, keep rate of every router, held-out perplexity."""
    figure, axes = _figure(3, len(runs), height=3.2)
    target = scale.router.get("target_keep_fraction", 0.5)
    for (name, lines), (losses, keep, ppl) in zip(runs.items(), axes, strict=True):
        train = [x for x in lines if x["kind"] == "train"]
        held = [x for x in lines if x["kind"] == "validation"]
        steps = [x["step"] for x in train]
        for part in ("anchor", "distill", "budget"):
            losses.plot(steps, [x[f"loss/{part}"] for x in train], label=part)
        losses.set(title=f"{name}: loss parts, unweighted", ylabel="nats per token")
        for group in sorted(k for k in train[0] if k.startswith("keep_rate/")):
            keep.plot(
                steps, [x[group] for x in train], linewidth=1, label=group.removeprefix("keep_rate/group")
            )
        keep.axhline(target, color="grey", linestyle="--")
        keep.set(title="keep rate by router", ylim=(0, 1.02))
        for kind in ("masked_ppl", "dense_ppl"):
            ppl.plot(
                [x["step"] for x in held],
                [x[kind] for x in held],
                marker="o",
                label=kind.removesuffix("_ppl"),
            )
        ppl.set(title="held-out perplexity", yscale="log")
        for panel in (losses, keep, ppl):
            panel.set_xlabel("step")
            panel.legend(fontsize="small", ncols=2)
    return _write(figure, path)


def masks(recorded: Path, pieces: list[str], path: Path, *, slots: int = 96) -> Path:
    """The first recorded window's gates (benchmarks.study.masks) by layer group, over its text.

    Args:
        pieces: text of every token id.
    """
    with np.load(recorded) as file:
        tokens, gates = file["tokens"][0, :slots], file["gates"][:, 0, :slots].astype(float)
    if gates.ndim == 3:
        gates = gates.mean(-1)
    figure, ((axes,),) = _figure(1, height=1.4 + 0.35 * len(gates))
    figure.set_figwidth(16)
    axes.imshow(gates, aspect="auto", cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    shown = [pieces[t].replace("\n", "⏎").replace(" ", "·") for t in tokens]
    axes.set_xticks(range(len(tokens)), shown, rotation=90, fontsize=6, family="monospace")
    axes.set_yticks(range(len(gates)), [f"group {i}" for i in range(len(gates))])
    axes.set_title("Slots kept (blue) in the first tokens of a held-out window, by layer group")
    return _write(figure, path)
