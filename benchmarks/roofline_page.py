"""The generated parts of docs/roofline.md: tables of benchmarks/roofline_counts.py, and what step.json's shares say of them.

The page keeps its prose; between `<!-- roofline: NAME -->` and `<!-- end -->` stands what BLOCKS[NAME] returns.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from benchmarks import roofline_counts
from benchmarks.roofline_counts import CONTEXTS, DEVICES, MODELS, PUBLISHED, STEP_TOKENS, Part

H100, A100 = DEVICES
STEP, ATTENTION, LOSS = (
    Path(__file__).with_name(name) for name in ("step.json", "attention.json", "loss.json")
)


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _total(parts: dict[str, Part], device: str | None = None) -> float:
    return sum(p.flops if device is None else p.seconds(DEVICES[device]) for p in parts.values())


def _context(s: int) -> str:
    return f"{s // 1024} k"


def parts_at(name: str, s: int) -> str:
    """Every part of a KV-CAT step of one model at one context."""
    work = roofline_counts.parts(MODELS[name], s)
    flops, seconds = _total(work), {d: _total(work, d) for d in DEVICES}
    body = [
        [
            part,
            f"{p.flops / 1e12:,.1f}",
            f"{p.flops / flops:.1%}",
            f"{p.bytes / 1e9:,.0f}",
            f"{p.flops / p.bytes:,.0f}",
            f"{p.seconds(DEVICES[H100]) * 1e3:,.0f}",
            f"{p.seconds(DEVICES[H100]) / seconds[H100]:.1%}",
            f"{p.seconds(DEVICES[A100]) * 1e3:,.0f}",
        ]
        for part, p in work.items()
    ]
    times = [f"{seconds[d] * 1e3:,.0f}" for d in DEVICES]
    body.append(
        [
            "**together**",
            f"{flops / 1e12:,.1f}",
            "",
            f"{sum(p.bytes for p in work.values()) / 1e9:,.0f}",
            "",
            times[0],
            "",
            times[1],
        ]
    )
    head = [
        f"{name}, {_context(s)}",
        "TFLOP",
        "share",
        "GB",
        "FLOP/byte",
        "H100 ms",
        "share",
        "A100 ms",
    ]
    return table(head, body)


def contexts(name: str) -> str:
    """How a step of one model changes with the context."""
    m = MODELS[name]
    body = []
    for s in CONTEXTS:
        work, plain = roofline_counts.parts(m, s), roofline_counts.parts(m, s, kvcat=False)
        narrow = _total(work) - work["attention, gated"].flops + work["attention, dense"].flops
        flops = _total(work)
        body.append(
            [
                _context(s),
                f"{flops / 1e15:,.2f}",
                f"{work['attention, dense'].flops / flops:.1%}",
                f"{work['attention, gated'].flops / flops:.1%}",
                f"{flops / narrow:.3f}",
                f"{flops / _total(plain):.2f}",
                f"{_total(work, H100):,.2f}",
                f"{_total(work, H100) / _total(plain, H100):.2f}",
                f"{_total(work, A100):,.2f}",
            ]
        )
    head = [
        name,
        "PFLOP",
        "dense attention",
        "gated attention",
        "× by padding",
        "× plain step",
        "H100 s",
        "× plain step",
        "A100 s",
    ]
    return table(head, body)


def widths() -> str:
    """What the columns of gates cost, by head dim."""
    body = []
    for name in ("Qwen2.5-0.5B", "Qwen2.5-7B"):
        m = MODELS[name]
        stored, computed = m.padded
        body.append(
            [
                str(m.head_dim),
                f"({m.head_dim + 2}, {m.head_dim + 3})",
                f"({stored}, {stored})",
                f"×{stored / m.head_dim:.2f}",
                f"({computed}, {computed})",
                f"×{computed / m.head_dim:.2f}",
            ]
        )
    return table(["head dim", "with columns", "stored", "bytes", "computed, in tiles", "FLOPs"], body)


def losses() -> str:
    """CE + KL by the memory of a chunk, in both forms."""
    body = []
    for triton in (False, True):
        form = "Triton" if triton else "PyTorch"
        for memory in (128, 512, 2048, 8192):
            line = [f"{form}, {memory:,}"]
            for name in PUBLISHED:
                work = roofline_counts.loss(MODELS[name], STEP_TOKENS, 2, memory, triton)
                line += [f"{work.flops / work.bytes:,.0f}", f"{work.seconds(DEVICES[H100]) * 1e3:,.0f}"]
            body.append(line)
    body.append(["compute alone"])
    for name in PUBLISHED:
        floor = roofline_counts.loss(MODELS[name], STEP_TOKENS, 2).flops / DEVICES[H100].flops
        body[-1] += ["", f"{floor * 1e3:,.0f}"]
    head = ["form, loss_memory_mib"] + [x for name in PUBLISHED for x in (f"{name} FLOP/byte", "H100 ms")]
    return table(head, body)


def logits() -> str:
    """Bytes of traffic per logit."""
    body = [
        [
            form,
            str(roofline_counts.logit_bytes(1, triton)),
            f"{roofline_counts.logit_bytes(2, triton) / 2:.0f}",
        ]
        for form, triton in (("PyTorch's operations", False), ("Triton", True))
    ]
    return table(["form", "CE alone, bytes a logit", "CE + KL, bytes a logit"], body)


def measured(path: Path = STEP) -> str:
    """The computed shares beside those measured on a CPU, if benchmarks/step.json is there."""
    if not path.exists():
        return (
            "No measurement lies beside this page: `make bench` writes benchmarks/step.json, and "
            "`python -m benchmarks.roofline` then sets the computed shares beside the measured ones here."
        )
    return compared(json.loads(path.read_text(encoding="utf-8")))


def attention(path: Path = ATTENTION) -> str:
    """Seconds and memory of gated attention against the plain kernel and the dense forms (benchmarks/attention.py)."""
    body = []
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        ratios = row["ratios"]

        def times(name: str, ratios=ratios) -> str:
            return f"×{ratios[name]:.2f}" if name in ratios else "too large"

        body.append(
            [
                f"{row['T']:,} × {row['D']}, {row['dtype']}",
                f"{row['seconds']['plain'] * 1e3:,.0f}",
                f"{row['seconds']['gated'] * 1e3:,.0f}",
                times("time gated/plain"),
                times("time dense_mask/gated"),
                times("time dense_gate/gated"),
                f"{row['peak_bytes']['gated'] / 2**20:,.0f}",
                times("memory dense_mask/gated"),
            ]
        )
    head = ["tokens × head dim", "plain ms", "gated ms", "gated / plain", "dense mask / gated"]
    return table([*head, "dense formula / gated", "gated MiB", "its memory / gated"], body)


def loss(path: Path = LOSS) -> str:
    """Seconds and memory of CE + KL from hidden states against the plain form (benchmarks/loss.py)."""
    body = [
        [
            f"{row['tokens']:,} × {row['vocabulary']:,} × {row['width']}, {row['passes']} pass(es)",
            f"{row['seconds']['fused']:,.2f}",
            f"×{row['ratios']['time fused/plain']:.2f}",
            f"{row['peak_bytes']['fused'] / 2**20:,.0f}",
            f"×{row['ratios']['memory fused/plain']:.3f}",
        ]
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]
    return table(["tokens × vocabulary × width", "s", "of plain", "MiB", "of plain"], body)


STAGES = {
    # of benchmarks/step.py → parts here; its attention stage holds the projections, its core the kernel and the columns
    "core of attention": ("attention, dense", "attention, gated", "columns of the gates"),
    "projections": ("projections",),
    "mlp": ("MLP",),
    "router": ("routers",),
    "loss": ("CE + KL", "CE"),
    "optimizer": ("optimizer",),
    "rest": ("norms, rotary, SwiGLU",),
}
CPU_MULTIPLE = 4
"""Widths of the CPU's kernel are multiples of this; in float32 the gates' columns are two."""


def _cpu_work(row: dict, form: str) -> dict[str, Part]:
    """The parts of one window of a row of step.json."""
    m = dataclasses.replace(MODELS["SmolLM2-135M"], layers=row["layers"])
    T = row["tokens"]
    work = roofline_counts.parts(m, T, form == "kvcat", N=T)
    if form == "kvcat":
        width = -(-(m.head_dim + 2) // CPU_MULTIPLE) * CPU_MULTIPLE
        work["attention, gated"] = roofline_counts.attention(m, T, T, width, width)
    return work


def compared(step: dict) -> str:
    """Tables of a step.json: each stage's FLOPs, its share of them and of the measured time, and the rate that implies."""
    out = [
        "Measured on a CPU in float32 (benchmarks/step.json), one window a step; FLOPs are computed as above."
    ]
    for row in step["rows"]:
        work = _cpu_work(row, "kvcat")
        measured = dict(row["stages"]["kvcat"])
        measured["core of attention"] = row["core_attention"]["kvcat"]
        measured["projections"] = measured.pop("attention") - measured["core of attention"]
        flops, seconds = _total(work), sum(measured.values())
        body = []
        for stage, names in STAGES.items():
            done = sum(work[name].flops for name in names if name in work)
            rate = done / measured[stage] / 1e9 if measured[stage] else 0.0
            body.append(
                [
                    stage,
                    f"{done / 1e9:,.1f}",
                    f"{done / flops:.1%}",
                    f"{measured[stage] * 1e3:,.0f}",
                    f"{measured[stage] / seconds:.1%}",
                    f"{rate:,.0f}",
                ]
            )
        ratio = row["ratios"]["step kvcat/plain"]
        floor = flops / _total(_cpu_work(row, "plain"))
        out.append(
            table([row["size"], "GFLOP", "share", "ms measured", "share", "GFLOP/s"], body)
            + f"\n\nA step of KV-CAT over a plain one: ×{ratio:.2f} measured, ×{floor:.2f} by FLOPs."
        )
    return "\n\n".join(out)


BLOCKS = {
    "widths": widths,
    "parts": lambda: "\n\n".join(parts_at(name, 4096) for name in PUBLISHED),
    "contexts": lambda: "\n\n".join(contexts(name) for name in PUBLISHED),
    "losses": losses,
    "logits": logits,
    "measured": measured,
    "attention": attention,
    "loss": loss,
}


def rendered(page: str) -> str:
    """The page with every block's text made anew.

    Raises:
        ValueError: when a block is missing, unknown or given twice.
    """
    names = re.findall(r"<!-- roofline: (\w+) -->", page)
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"docs/roofline.md has blocks {names}; wanted are {list(BLOCKS)}, each once")
    return re.sub(
        r"(<!-- roofline: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}",
        page,
        flags=re.S,
    )
