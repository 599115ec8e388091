"""CE + KL over the vocabulary: from hidden states in one sweep, against forms that make the logits of all tokens.

Every form runs in a process of its own, so that its peak memory is its own; the forms of a size take turns, so that
a busy moment of the machine meets all of them. A run is forward and backward, to gradients of hidden states and output
weight. Writes one JSON with a manifest and a picture.

    python -m benchmarks.loss                            # some three minutes on two quiet cores
    python -m benchmarks.loss --only small --rounds 5 --out /tmp/loss.json --plot /tmp/loss.png
    python -m benchmarks.loss --plot-only                # draw the picture again from the JSON

Forms: `fused` kernels.losses.token_loss with the tokens' weights known, as training calls it; `two_sweeps` the same without
them; `plain` method.losses on logits; `torch` torch.nn.functional.linear_cross_entropy in its chunked form (CE alone).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from benchmarks.paired_timing import require_linux, save_figure, serve, take_turns, write_report
from benchmarks.smoke import add_option, shrink

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    # name → tokens, vocabulary, width, passes, forms
    "small": (512, 49_152, 576, 2, ("fused", "plain", "two_sweeps")),
    "one pass": (512, 49_152, 576, 1, ("fused", "plain", "torch")),
    "issue": (2048, 151_936, 896, 2, ("fused", "plain")),
}


SMOKE = {
    "smoke": (16, 256, 32, 2, ("fused", "plain", "two_sweeps")),
    "smoke one pass": (16, 256, 32, 1, ("fused", "plain", "torch")),
}

# ---- one form in a process of its own


def form(name: str, hidden, weight, labels, paired: bool, memory_mib: float):
    """Forward and backward of one form."""
    import torch
    from torch.nn import functional as F

    from kvcat_nemo.kernels.losses.token_loss import token_losses
    from kvcat_nemo.method.losses import kl_teacher_student, next_token_ce

    hidden.grad = weight.grad = None
    if name in ("fused", "two_sweeps"):
        weights = torch.ones(1 + paired, *labels.shape) if name == "fused" else None
        out = token_losses(hidden, weight, labels, paired=paired, loss_weights=weights, memory_mib=memory_mib)
        loss = out[: 1 + paired].sum()
    elif name == "torch":
        options = torch.nn.LinearCrossEntropyOptions()
        loss = F.linear_cross_entropy(hidden[:, 0], weight, labels[0], reduction="sum", options=options)
    else:
        logits = (hidden @ weight.t()).transpose(0, 1)
        if paired:
            dense, masked = logits.chunk(2)
            loss = (next_token_ce(dense, labels) + kl_teacher_student(dense, masked)).sum()
            with torch.no_grad():
                next_token_ce(masked, labels)
                _ = dense.argmax(-1) == masked.argmax(-1)
            del dense, masked
        else:
            loss = next_token_ce(logits, labels).sum()
        del logits
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def worker(name: str, size: str, memory_mib: float) -> None:
    """Serves runs of one form."""
    import torch

    tokens, vocabulary, width, passes, _ = (SIZES | SMOKE)[size]
    rng = torch.Generator().manual_seed(0)
    hidden = torch.empty(tokens, passes, width).normal_(generator=rng).requires_grad_()
    weight = torch.empty(vocabulary, width).normal_(0, 0.03, generator=rng).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens), generator=rng)
    few = hidden[:2].detach().requires_grad_(), weight[:64].detach().requires_grad_(), labels[:, :2] % 64
    form(name, *few, passes == 2, 1)  # threads and code are there before the first measured run

    def run() -> tuple:
        results = form(name, hidden, weight, labels, passes == 2, memory_mib)
        hidden.grad = weight.grad = None  # not resident any more when the next run begins
        return results

    serve(run)


# ---- all forms of a size, taking turns


def measure(size: str, rounds: int, threads: int, memory_mib: float, fork=None) -> dict:
    tokens, vocabulary, width, passes, forms = (SIZES | SMOKE)[size]
    common = ["--memory-mib", str(memory_mib), "--worker"]
    arguments = {name: [*common, name, size] for name in forms}
    # The same loss and gradients, or the comparison means nothing.
    agree = [(name, "fused", 1e-4) for name in forms[1:]]
    runs = take_turns("benchmarks.loss", arguments, rounds, threads, fork, agree)
    return {
        "size": size, "tokens": tokens, "vocabulary": vocabulary, "width": width, "passes": passes, "dtype": "float32",
        "seconds": {name: min(r["seconds"] for r in runs[name]) for name in forms},
        "seconds_all": {name: [round(r["seconds"], 4) for r in runs[name]] for name in forms},
        "cpu_seconds": {name: min(r["cpu_seconds"] for r in runs[name]) for name in forms},
        "peak_bytes": {name: max(r["peak_bytes"] for r in runs[name]) for name in forms},
        "ratios": {
            f"{what} fused/{name}": statistics.median(a[key] / b[key] for a, b in zip(runs["fused"], runs[name], strict=True))
            for name in forms[1:]
            for what, key in (("time", "seconds"), ("cpu time", "cpu_seconds"), ("memory", "peak_bytes"))
        },
    }  # fmt: skip


def draw(report: dict, path: Path) -> None:
    """Bars of memory and time, one group a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"fused": "tab:blue", "two_sweeps": "tab:cyan", "plain": "tab:orange", "torch": "tab:green"}
    figure, axes = pyplot.subplots(
        2, len(report["rows"]), figsize=(4 * len(report["rows"]), 6), squeeze=False
    )
    for column, row in zip(axes.T, report["rows"], strict=True):
        what = "CE + KL of two passes" if row["passes"] == 2 else "CE of one pass"
        column[0].set_title(
            f"{what}\n{row['tokens']} tokens × {row['vocabulary']:,}, width {row['width']}", fontsize=9
        )
        for axis, key, unit, factor in (
            (column[0], "peak_bytes", "peak memory, GiB", 2**30),
            (column[1], "seconds", "seconds", 1),
        ):
            values = {name: value / factor for name, value in row[key].items()}
            bars = axis.bar(list(values), list(values.values()), color=[colours[name] for name in values])
            axis.bar_label(bars, fmt="%.2f", fontsize=8)
            axis.set_ylabel(unit, fontsize=8)
            axis.margins(y=0.15)
            axis.spines[["top", "right"]].set_visible(False)
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
        default=2,
        help="runs of each form, twice as many at the small size (default: %(default)s)",
    )
    add("--threads", type=int, default=2, help="OpenMP threads (default: %(default)s)")
    add("--memory-mib", type=float, default=0, help="kvcat.loss_memory_mib (default: the setting's own)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "loss.json")
    add("--plot", type=Path, default=ROOT / "docs" / "img" / "loss_memory.png")
    add("--plot-only", action="store_true", help="draw the picture from --out and measure nothing")
    add_option(parser)
    add("--worker", nargs=2, metavar=("FORM", "SIZE"), help=argparse.SUPPRESS)
    return shrink(parser.parse_args(argv), parser, only=list(SMOKE), rounds=1, threads=1)


def main(argv=None) -> None:
    args = arguments(argv)
    if args.worker:
        return worker(*args.worker, args.memory_mib)
    if not args.plot_only:
        from kvcat_nemo.kernels.losses.token_loss import LOSS_MEMORY_MIB

        require_linux()
        began = time.time()
        rows = []
        for size in args.only or SIZES:
            rounds = args.rounds * (2 if size == "small" else 1)
            rows.append(measure(size, rounds, args.threads, args.memory_mib, main if args.smoke else None))
            print(size, rows[-1]["seconds"], flush=True)
        budget = args.memory_mib or LOSS_MEMORY_MIB["cpu"]
        write_report(rows, args.out, began, threads=args.threads, loss_memory_mib=budget)
    report = json.loads(args.out.read_text())
    draw(report, args.plot)
    for row in report["rows"]:
        print(row["size"], {name: round(value, 3) for name, value in row["ratios"].items()})


if __name__ == "__main__":
    main()
