"""Charts as inline SVG, drawn by matplotlib; colours and text come from the page's CSS, so that light and dark both read
well. Needs no display: figures are made without pyplot."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 320
COLOURS = 8
"""Number of series colours the stylesheet has (--s0 … --s7)."""
_MARKERS = (("o", "●"), ("s", "■"), ("D", "◆"), ("^", "▲"))
"""matplotlib's name, and what stands for it in the legend."""
# Colours that nobody else uses, and the stylesheet's names that take their places in the SVG.
_STANDS_FOR = {f"#0a0b{n:02x}": f"var(--s{n})" for n in range(COLOURS)}
_TEXT, _SOFT, _GRID, _PAGE = "#0a0c01", "#0a0c02", "#0a0c03", "#0a0c04"
_STANDS_FOR |= {_TEXT: "var(--text)", _SOFT: "var(--soft)", _GRID: "var(--grid)", _PAGE: "var(--page)"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_GAP = 6
"""Pixels between two labels of an axis, at least."""


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


def _number(value: float) -> str:
    """Of an axis: short, also over many decades."""
    if value and not 1e-3 <= abs(value) < 1e5:
        power = math.floor(math.log10(abs(value)) + 1e-9)
        digits = f"{value / 10.0**power:.3g}"
        factor = {"1": "", "-1": "−"}.get(digits, f"{digits}·")
        return f"{factor}10{str(power).translate(_SUPERSCRIPT)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, **how) -> str:
    """An SVG of lines with error bars, and a legend below it.

    Args:
        how: see `draw`.

    Raises:
        ValueError: as `draw`.
    """
    figure, titles = draw(series, x_label=x_label, y_label=y_label, **how)
    svg = _inline(figure, titles, f"{y_label} over {x_label}")
    return svg + _legend([s for s in series if _finite(s)])


def _finite(series: Series) -> list[Point]:
    return sorted((p for p in series.points if math.isfinite(p.y)), key=lambda p: p.x)


def draw(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
    x_log: bool = False,
    x_format: Callable[[float], str] = _number,
    markers: bool = True,
):
    """The chart as matplotlib's figure; and by the id of a group in its SVG, the group's CSS class and title.

    The y axis is logarithmic when positive values span more than a factor of 20.

    Args:
        x_ticks: where the x axis has labels, as far as they fit; x_format: what they say; x_log: a logarithmic x axis.
        markers: a mark with its error bar at each point.

    Raises:
        ValueError: when there is no finite point, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
    except ImportError as error:
        raise ValueError(f"charts are drawn by matplotlib: pip install matplotlib ({error})") from None
    series = [s for s in series if _finite(s)]
    points = [p for s in series for p in _finite(s)]
    if not points:
        raise ValueError("chart: no finite value to draw")
    values = [p.y for p in points]
    y_log = min(values) > 0 and max(values) / min(values) > 20
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")
    axes = figure.add_subplot()
    titles = {}
    for order, one in enumerate(series):
        number = (order if one.colour is None else one.colour) % COLOURS
        colour, drawn = f"#0a0b{number:02x}", _finite(one)
        (line,) = axes.plot(
            [p.x for p in drawn],
            [p.y for p in drawn],
            *("--" if one.dashed else "-",),
            color=colour,
            linewidth=2,
            gid=f"line-{order}",
        )
        titles[line.get_gid()] = (f"line s{number}", one.name)
        if markers and (sure := [p for p in drawn if p.error]):
            # A logarithmic axis has no 0.
            below = [min(p.error, p.y * (1 - 1e-6)) if y_log else p.error for p in sure]
            axes.errorbar(
                [p.x for p in sure],
                [p.y for p in sure],
                [below, [p.error for p in sure]],
                **{"fmt": "none", "ecolor": colour, "elinewidth": 2, "capsize": 4, "capthick": 2},
            )
        for place, p in enumerate(drawn if markers else ()):  # one by one: each has a title of its own
            shape, gid = _MARKERS[number % len(_MARKERS)][0], f"point-{order}-{place}"
            look = {"markersize": 7, "markeredgecolor": _PAGE, "markeredgewidth": 1, "zorder": 3}
            axes.add_line(Line2D([p.x], [p.y], marker=shape, color=colour, gid=gid, **look))
            error = f" ± {_number(p.error)}" if p.error else ""
            titles[gid] = ("mark", f"{one.name}: {_number(p.y)}{error} at {x_format(p.x)}")
    axes.set_xlabel(x_label, color=_TEXT, fontsize=14)
    axes.set_ylabel(f"{y_label} (log scale)" if y_log else y_label, color=_TEXT, fontsize=14)
    if x_log:
        axes.set_xscale("log")
    if y_log:
        axes.set_yscale("log")
        # An error bar down to nearly 0 must not stretch the axis over empty decades.
        low, high = min(values), max(p.y + p.error for p in points)
        low = max(min(p.y - p.error for p in points), low / 10)
        axes.set_ylim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
        few = high / low < 300
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: x_format(value)))
    if x_ticks:
        axes.xaxis.set_major_locator(FixedLocator(list(x_ticks)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=_GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6, labelsize=13, labelcolor=_SOFT)
    axes.set_frame_on(False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out: not again when it is written
    for axis in (axes.xaxis, axes.yaxis):
        _thin(axis)
    return figure, titles


def _thin(axis) -> None:
    """Hide labels that would touch the one before, so that none overlap whatever the ticks are."""
    labels = [label for label in axis.get_ticklabels() if label.get_text()]
    side = 0 if axis.axis_name == "x" else 1
    ends = [(label.get_window_extent().get_points()[:, side], label) for label in labels]
    shown_to = -math.inf
    for (low, high), label in sorted(ends, key=lambda end: end[0][0]):
        if low < shown_to + _GAP:
            label.set_visible(False)
        else:
            shown_to = high


def _inline(figure, titles: dict[str, tuple[str, str]], label: str) -> str:
    """matplotlib's SVG as part of a page: no ids that another chart has too, the page's colours and font."""
    import matplotlib

    salt = hashlib.sha256(repr((sorted(titles.items()), label)).encode()).hexdigest()
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(
            out,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"<svg .*?>", _opening(label), svg, count=1, flags=re.S)
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', svg))

    def group(found: re.Match) -> str:
        name = found[1]
        if name in titles:
            kind, title = titles[name]
            return f'<g class="{kind}"><title>{escape(title)}</title>'
        return found[0] if name in used else "<g>"

    svg = re.sub(r'<g id="[\w.-]+"/>', "", svg)
    svg = re.sub(r'<g id="([\w.-]+)">', group, svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    for colour, name in _STANDS_FOR.items():
        svg = svg.replace(colour, name)
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def _opening(label: str) -> str:
    name = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" {name}>'


def _legend(series: Sequence[Series]) -> str:
    items = []
    for order, one in enumerate(series):
        number = (order if one.colour is None else one.colour) % COLOURS
        ends = "╌" if one.dashed else "─"
        sample = f"{ends}{_MARKERS[number % len(_MARKERS)][1]}{ends}"
        items.append(
            f'<li><span class="line s{number}" aria-hidden="true">{sample}</span>{escape(one.name)}</li>'
        )
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
