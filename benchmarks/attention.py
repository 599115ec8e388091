"""Gated attention: ours on the plain fused kernel, against that kernel alone and against the dense mask a user writes.

Every form runs in a process of its own, so that its peak memory is its own; the forms of a size take turns, so that
a busy moment of the machine meets all of them. A run is forward and backward, to gradients of q, k, v and the gates.
Writes one JSON with a manifest and a picture.

    python -m benchmarks.attention                       # all sizes, some ten minutes on two quiet cores
    python -m benchmarks.attention --only 2048x64 --rounds 9 --out /tmp/a.json --plot /tmp/a.png
    python -m benchmarks.attention --plot-only           # draw the picture again from the JSON

Forms: `plain` torch.nn.functional.scaled_dot_product_attention, causal, without gates: the floor; `gated`
kernels.gated_attention; `behind_cut` kernels.span_gated_attention with a cut at half the window, where most products are
gated, and `eight_spans` with seven cuts; `dense_mask` the same function with a float mask, log-gates in it, that takes a gradient, so
that PyTorch forms the T × T matrices (gates that are shut get no gradient from it); `dense_gate` the formula as written,
method.attention, whose gradients are those of `gated`. Dense forms are left out where they would exceed --dense-limit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.paired_timing import (
    compare,
    digest,
    require_linux,
    save_figure,
    serve,
    take_turns,
    write_report,
)
from benchmarks.smoke import add_option, shrink

ROOT = Path(__file__).resolve().parent.parent
HEADS = {64: (9, 3), 128: (12, 2)}
"""Head dim → query and KV heads: SmolLM2-135M's and Qwen2.5-1.5B's."""
SIZES = {f"{T}x{D}": (T, D, "float32") for D in HEADS for T in (512, 1024, 2048, 4096, 8192)}
SIZES |= {f"{T}x64-bfloat16": (T, 64, "bfloat16") for T in (2048, 4096)}
SMOKE = {"smoke 64x64": (64, 64, "float32"), "smoke 64x64-bfloat16": (64, 64, "bfloat16")}
SPANS = {"behind_cut": 2, "eight_spans": 8}
"""Form → spans of a window."""
MATRICES = {"dense_mask": 6, "dense_gate": 12}
"""T × T matrices of every head that a dense form's forward and backward hold at once, about."""
BOUNDS = {"float32": 1e-3, "bfloat16": 3e-2}
"""How far o, dq, dk and dv may be off, relative to their norms: a gate clamped at 1e-9 is shut to float32's rounding."""


def form(name: str, q, k, v, gate, do):
    """Forward and backward of one form; gradients of the leaves."""
    import torch
    from torch.nn import functional as F

    from kvcat_nemo.kernels import gated_attention, span_gated_attention
    from kvcat_nemo.method.attention import gated_attention_reference
    from kvcat_nemo.method.spans import Spans

    T, scale = q.shape[1], q.shape[-1] ** -0.5
    leaves = [q, k, v] if name == "plain" else [q, k, v, gate]
    if name == "gated":
        out = gated_attention(q, k, v, gate, scale=scale)
    elif name in SPANS:
        spans = Spans.from_cuts([[T * i // SPANS[name] for i in range(1, SPANS[name])]], T)
        out = span_gated_attention(q, k, v, gate, spans=spans, scale=scale)
    elif name == "dense_gate":
        out = gated_attention_reference(q, k, v, gate.to(q), scale=scale)
    else:
        mask = None
        if name == "dense_mask":
            open_slots = torch.eye(T, dtype=torch.bool)
            mask = torch.where(open_slots, 0.0, gate[:, None, :, 0].clamp(min=1e-9).log())
            mask = mask.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), float("-inf"))[:, None].to(q)
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        ).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def worker(name: str, size: str) -> None:
    """Serves runs of one form."""
    import torch

    T, D, dtype = (SIZES | SMOKE)[size]
    H, G = HEADS[D]
    rng = torch.Generator().manual_seed(0)
    q, k, v, do = (
        torch.empty(1, T, heads, D).normal_(generator=rng).to(getattr(torch, dtype)) for heads in (H, G, G, H)
    )
    gate = torch.rand(1, T, 1, generator=rng).round()
    leaves = [x.requires_grad_() for x in (q, k, v, gate)]
    few = [x[:, :64].detach() for x in leaves]
    got = form(name, *(x.requires_grad_() for x in few), do[:, :64])
    if name not in ("plain", *SPANS):  # against the oracle, also at sizes where no dense form fits beside it
        wide = (x.detach().double().requires_grad_() for x in few)
        expected = form("dense_gate", *wide, do[:, :64].double())
        checks = {name: {"check": digest(*got[:4])}, "the oracle": {"check": digest(*expected[:4])}}
        compare(checks, [(name, "the oracle", BOUNDS[dtype])])

    serve(lambda: form(name, *leaves, do)[:4])


def forms_of(size: str, dense_limit: float) -> list[str]:
    T, D, dtype = (SIZES | SMOKE)[size]
    one = HEADS[D][0] * T * T * (4 if dtype == "float32" else 2)
    return [
        "plain",
        "gated",
        *SPANS,
        *(n for n, count in MATRICES.items() if count * one <= dense_limit * 2**30),
    ]


def measure(size: str, rounds: int, threads: int, dense_limit: float, fork=None) -> dict:
    T, D, dtype = (SIZES | SMOKE)[size]
    names = forms_of(size, dense_limit)
    arguments = {name: ["--worker", name, size] for name in names}
    dense_forms = [name for name in names if name in MATRICES]
    agree = [(dense, "gated", BOUNDS[dtype]) for dense in dense_forms]
    runs = take_turns("benchmarks.attention", arguments, rounds, threads, fork, agree)
    pairs = [(form, "plain") for form in ("gated", *SPANS)] + [(dense, "gated") for dense in dense_forms]
    # Of the first run: later ones find memory that the process did not give back.
    peaks = {name: max(r["peak_bytes"] for r in runs[name]) for name in names}
    return {
        "size": size, "T": T, "D": D, "heads": HEADS[D][0], "kv_heads": HEADS[D][1], "dtype": dtype,
        "seconds": {name: min(r["seconds"] for r in runs[name]) for name in names},
        "seconds_all": {name: [round(r["seconds"], 4) for r in runs[name]] for name in names},
        "cpu_seconds": {name: min(r["cpu_seconds"] for r in runs[name]) for name in names},
        "peak_bytes": peaks,
        "ratios": {
            f"{what} {a}/{b}": statistics.median(x[key] / y[key] for x, y in zip(runs[a], runs[b], strict=True))
            for a, b in pairs
            for what, key in (("time", "seconds"), ("cpu time", "cpu_seconds"))
        } | {f"memory {a}/{b}": peaks[a] / peaks[b] for a, b in pairs},
    }  # fmt: skip


def draw(report: dict, path: Path) -> None:
    """Time and memory over tokens, one column for each head dim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {
        "dense_gate": "dense formula",
        "dense_mask": "dense float mask",
        "gated": "gated (ours)",
        "behind_cut": "gated behind a cut (ours)",
        "plain": "plain fused",
    }
    colours = {"dense_gate": "tab:red", "dense_mask": "tab:orange", "gated": "tab:blue", "plain": "tab:gray"}
    colours["behind_cut"] = "tab:green"
    rows = [row for row in report["rows"] if row["dtype"] == "float32"]
    dims = sorted({row["D"] for row in rows})
    figure, axes = pyplot.subplots(2, len(dims), figsize=(5 * len(dims), 6.4), squeeze=False, sharex=True)
    for column, D in zip(axes.T, dims, strict=True):
        mine = sorted((row for row in rows if row["D"] == D), key=lambda row: row["T"])
        column[0].set_title(f"D = {D}, {mine[0]['heads']} heads, {mine[0]['kv_heads']} KV heads", fontsize=10)
        for axis, key, unit, factor in (
            (column[0], "seconds", "seconds, forward + backward", 1),
            (column[1], "peak_bytes", "peak memory, MiB", 2**20),
        ):
            for name, label in labels.items():
                points = [(row["T"], row[key][name] / factor) for row in mine if name in row[key]]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=label, color=colours[name])
            axis.set(xscale="log", yscale="log")
            axis.set_ylabel(unit, fontsize=8)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel("tokens")
        column[1].set_xticks([row["T"] for row in mine], [str(row["T"]) for row in mine])
        column[1].minorticks_off()
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--only", choices=SIZES, action="append", help="measure this size alone (may be repeated)")
    add(
        "--rounds",
        type=int,
        default=3,
        help="runs of each form at 8192 tokens, more below (default: %(default)s)",
    )
    add("--threads", type=int, default=2, help="OpenMP threads (default: %(default)s)")
    add("--dense-limit", type=float, default=6, help="GiB that a dense form may take (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "attention.json")
    add("--plot", type=Path, default=ROOT / "docs" / "img" / "attention.png")
    add("--plot-only", action="store_true", help="draw the picture from --out and measure nothing")
    add_option(parser)
    add("--worker", nargs=2, metavar=("FORM", "SIZE"), help=argparse.SUPPRESS)
    return shrink(parser.parse_args(argv), parser, only=list(SMOKE), rounds=1, threads=1)


def main(argv=None) -> None:
    args = arguments(argv)
    if args.worker:
        return worker(*args.worker)
    if not args.plot_only:
        require_linux()
        began = time.time()
        rows = []
        for size in args.only or SIZES:
            tokens = (SIZES | SMOKE)[size][0]
            rounds = args.rounds * (1 if tokens > 4096 or args.smoke else 2 if tokens > 2048 else 3)
            fork = main if args.smoke else None
            rows.append(measure(size, rounds, args.threads, args.dense_limit, fork))
            print(size, {name: round(value, 4) for name, value in rows[-1]["seconds"].items()}, flush=True)
        write_report(rows, args.out, began, threads=args.threads, dense_limit_gib=args.dense_limit)
    report = json.loads(args.out.read_text())
    draw(report, args.plot)
    for row in report["rows"]:
        print(row["size"], {name: round(value, 3) for name, value in row["ratios"].items()})


if __name__ == "__main__":
    main()
