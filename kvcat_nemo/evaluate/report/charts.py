"""Charts as inline SVG: colours and text come from the page's CSS, so that light and dark both read well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 48
COLOURS = 8
"""Number of series colours the stylesheet has (--s0 … --s7)."""
_MARKERS = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Point:
    """One mean with its standard error."""

    x: float
    y: float
    error: float = 0.0


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str
    points: Sequence[Point]
    dashed: bool = False
    """For reference curves, e.g. the paper's."""
    colour: int | None = None
    """Of the stylesheet's series colours; by order when None."""


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of each decade within [low, high], at least two of them, with their neighbours outside."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    first = max(i for i, t in enumerate(ticks) if t <= low * 1.0001)
    last = min(i for i, t in enumerate(ticks) if t >= high * 0.9999)
    return ticks[first : last + 1]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _marker(kind: str, x: float, y: float, css: str, title: str) -> str:
    tip = f"<title>{escape(title)}</title>"
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{css}">{tip}</circle>'
    corners = {
        "square": ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
        "triangle": ((0, -4.8), (4.6, 3.8), (-4.6, 3.8)),
    }[kind]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}" class="{css}">{tip}</polygon>'


def _scale(ticks: list[float], start: float, end: float, log: bool) -> Callable[[float], float]:
    first, last = (math.log10(t) if log else t for t in (ticks[0], ticks[-1]))

    def place(value: float) -> float:
        at = math.log10(max(value, 1e-300)) if log else value
        return start + (min(max(at, first), last) - first) / ((last - first) or 1.0) * (end - start)

    return place


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    x_log: bool = False,
    x_format: Callable[[float], str] = _number,
    markers: bool = True,
) -> str:
    """An SVG of lines with error bars; the y axis is logarithmic when positive values span more than a factor of 20.

    Raises:
        ValueError: when there is no finite point.
    """
    series = [s for s in series if any(math.isfinite(p.y) for p in s.points)]
    points = [p for s in series for p in s.points if math.isfinite(p.y)]
    if not points:
        raise ValueError("chart: no finite value to draw")
    ys = [p.y for p in points]
    y_log = min(ys) > 0 and max(ys) / min(ys) > 20
    lower = [p.y - p.error for p in points]
    low = min(y for y in [*lower, *ys] if y > 0 or not y_log)
    ticks = (log_ticks if y_log else nice_ticks)(low, max(p.y + p.error for p in points))
    xs = [p.x for p in points]
    shown_x = list(x_ticks) if x_ticks else (log_ticks if x_log else nice_ticks)(min(xs), max(xs))
    ends_x = [min(min(xs), shown_x[0]), max(max(xs), shown_x[-1])]
    inset = 18 if markers else 0
    place_x = _scale(ends_x, _LEFT + inset, WIDTH - _RIGHT - inset, x_log)
    place_y = _scale(ticks, HEIGHT - _BOTTOM, _TOP, y_log)
    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">'
    ]
    for tick in ticks:
        y = place_y(tick)
        out.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        out.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="tick" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in shown_x:
        x = place_x(tick)
        out.append(
            f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 20}" class="tick" text-anchor="middle">{escape(x_format(tick))}</text>'
        )
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    out.append(
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 8}" class="label" text-anchor="middle">{escape(x_label)}</text>'
    )
    axis = f"{y_label} (log scale)" if y_log else y_label
    out.append(
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" class="label" text-anchor="middle">{escape(axis)}</text>'
    )
    for order, one in enumerate(series):
        number = order if one.colour is None else one.colour
        css, kind = f"s{number % COLOURS}", _MARKERS[number % len(_MARKERS)]
        drawn = sorted((p for p in one.points if math.isfinite(p.y)), key=lambda p: p.x)
        path = " ".join(f"{place_x(p.x):.1f},{place_y(p.y):.1f}" for p in drawn)
        dash = " dashed" if one.dashed else ""
        out.append(f'<polyline points="{path}" class="line {css}{dash}"/>')
        for p in drawn if markers else ():
            x = place_x(p.x)
            if p.error:
                top, bottom = place_y(p.y + p.error), place_y(p.y - p.error)
                out.append(
                    f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {bottom:.1f}h8" class="line {css}"/>'
                )
            title = f"{one.name}: {_number(p.y)}" + (f" ± {_number(p.error)}" if p.error else "")
            out.append(_marker(kind, x, place_y(p.y), f"mark {css}", f"{title} at {x_format(p.x)}"))
    out.append("</svg>")
    return "".join(out) + _legend(series)


def _legend(series: Sequence[Series]) -> str:
    items = []
    for order, one in enumerate(series):
        number = order if one.colour is None else one.colour
        css = f"s{number % COLOURS}"
        dash = " dashed" if one.dashed else ""
        sample = (
            f'<svg viewBox="0 0 30 12" class="sample"><line x1="1" x2="29" y1="6" y2="6" class="line {css}{dash}"/>'
            f"{_marker(_MARKERS[number % len(_MARKERS)], 15, 6, f'mark {css}', one.name)}</svg>"
        )
        items.append(f"<li>{sample}{escape(one.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], *, corner: str
) -> str:
    """A table whose cells are shaded by their value in [0, 1]; None is an empty cell."""
    head = "".join(f"<th scope='col'>{escape(c)}</th>" for c in columns)
    body = []
    for name, line in zip(rows, values, strict=True):
        cells = "".join(
            "<td></td>"
            if v is None
            else f'<td class="heat{" strong" if v > 0.55 else ""}" style="--v:{min(max(v, 0.0), 1.0):.3f}">{100 * v:.0f}</td>'
            for v in line
        )
        body.append(f"<tr><th scope='row'>{escape(name)}</th>{cells}</tr>")
    return f'<div class="scroll"><table class="map"><thead><tr><th>{escape(corner)}</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
