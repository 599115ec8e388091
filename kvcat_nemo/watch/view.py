"""The terminal's picture of a run."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvcat_nemo.method.config import keep_target
from kvcat_nemo.watch.state import History, Snapshot, duration

_BLOCKS = "▁▂▃▄▅▆▇█"
_COLOURS = {"running": "green", "finished": "bold green", "quiet": "bold red", "waiting": "yellow"}
_LOSSES = (
    ("loss/total", "total, weighted"),
    ("loss/anchor", "anchor: CE of the dense pass"),
    ("loss/distill", "distill: KL(dense ‖ masked)"),
    ("loss/budget", "budget"),
)


def sparkline(values: list[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """`values` squeezed to at most `width` block characters, the mean of each stretch; low and high are the scale's ends."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    low = min(means) if low is None else low
    high = max(means) if high is None else high
    span = (high - low) or 1.0
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round(min(max((m - low) / span, 0.0), 1.0) * top)] for m in means)


def render(run: Snapshot, width: int = 100) -> RenderableType:
    """A panel of the run for a terminal `width` columns wide."""
    line = max(width - 52, 12)
    parts: list[RenderableType] = [Text(run.detail, style=_COLOURS[run.status])]
    if run.max_steps:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        bar.add_row(
            ProgressBar(total=run.max_steps, completed=min(run.step, run.max_steps)),
            f"step {run.step:,} of {run.max_steps:,}",
        )
        parts.append(bar)
    elif run.last:
        parts.append(Text(f"step {run.step:,}"))
    parts.append(_facts(run))
    if run.last:
        parts.append(_figures("loss", [(k, label) for k, label in _LOSSES if k in run.last], run, line))
        groups = sorted(
            (k for k in run.last if k.startswith("keep_rate/group")),
            key=lambda k: int(k.rpartition("group")[2]),
        )
        if groups:
            model = run.config.get("model")
            settings = model.get("kvcat") if isinstance(model, dict) else None
            target = keep_target(settings) if isinstance(settings, dict) else None
            title = "keep rate" if target is None else f"keep rate (target {target:g})"
            rows = [(k, f"router {k.rpartition('group')[2]}") for k in groups]
            parts.append(_figures(title, [("keep_rate", "mean"), *rows], run, line, low=0.0, high=1.0))
    if run.validation:
        parts.append(_held_out(run))
    return Panel(Group(*parts), title=str(run.folder), title_align="left", width=width)


def _facts(run: Snapshot) -> Table:
    table = Table.grid(padding=(0, 2))
    speed = f"{run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else "tokens/s not known yet"
    if "tflops_per_gpu" in run.last:
        speed += f", {run.last['tflops_per_gpu']:.3g} TFLOP/s a process"
    left = f"about {duration(run.seconds_left)} left" if run.seconds_left is not None else ""
    memory = f"peak {run.last['peak_memory_bytes'] / 1e9:.1f} GB" if run.last.get("peak_memory_bytes") else ""
    saved = (
        f"checkpoint {run.checkpoint}, {duration(run.checkpoint_age or 0)} ago"
        if run.checkpoint
        else "no checkpoint yet"
    )
    table.add_row(speed, left)
    table.add_row(saved, memory)
    return table


def _figures(
    title: str,
    rows: list[tuple[str, str]],
    run: Snapshot,
    width: int,
    low: float | None = None,
    high: float | None = None,
) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=30, no_wrap=True)
    table.add_column(width=9, justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_row(Text(title, style="bold"))
    for name, label in rows:
        values = [value for _, value in run.history.get(name, History()).points]
        table.add_row(
            f"  {label}", f"{run.last.get(name, float('nan')):.4f}", sparkline(values, width, low, high)
        )
    return table


def _held_out(run: Snapshot) -> Text:
    held = run.validation
    text = f"held out at step {held['step']:,}: perplexity dense {held.get('dense_ppl', float('nan')):.2f}"
    if "masked_ppl" in held:
        text += f", masked {held['masked_ppl']:.2f} at keep {held.get('keep_rate', float('nan')):.3f}"
    return Text(text)
