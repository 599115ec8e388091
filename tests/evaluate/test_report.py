"""The page of results: what it says, that it stands alone, and how a browser shows it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.evaluate.continuation import summary
from kvcat_nemo.evaluate.report import read_results, write_report
from kvcat_nemo.evaluate.report.charts import Point, Series, draw, line_chart
from kvcat_nemo.evaluate.report.tables import difference, number, with_error

KEEPS = (0.05, 0.1, 0.2, 0.4)


def rows_of(model, better=0.0):
    """Rows as the protocol itself sums them up, from made-up windows."""
    rows = []
    for compressor, harm in (("none", 0.0), ("attention-matching", 0.05), ("recent:sinks=4", 0.3)):
        for keep in KEEPS if harm else (1.0,):
            loss = (harm - better * (harm > 0)) * (1 - keep)
            items = [
                {
                    "nll": 3 + 0.1 * w + loss * (1 + 0.1 * w),
                    "nll_dense": 3 + 0.1 * w,
                    "kl": loss / 3,
                    "top1": 1 - loss / 4,
                    "slots": 768 * keep,
                    "bytes": int(1e7 * keep),
                    "seconds": 1.5,
                }
                for w in range(5)
            ]
            head = {"model": model, "compressor": compressor, "keep": keep, "question_aware": False}
            rows.append({**head, "slots_full": 768, **summary(items, 255)})
    return rows


def write(folder, rows, protocol="continuation", data="d"):
    folder.mkdir(parents=True, exist_ok=True)
    value = {"protocol": protocol, "rows": rows, "manifest": {"data": {"windows": data}, "seeds": [0]}}
    (folder / "results.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("page")
    results = write(tmp_path / "results", rows_of("base") + rows_of("<kv-cat>", better=0.02))
    return write_report([results], tmp_path / "page.html", title="Compression & co")


class Seen(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_stands_alone_and_says_everything(page):
    source = page[0].read_text()
    seen = Seen()
    seen.feed(source)
    assert not seen.links and "script" not in seen.tags and "@import" not in source
    assert not re.search(r"url\((?!#)|xlink:href=\"(?!#)", source)  # what a chart points to is in it
    text = " ".join(" ".join(seen.text).split())
    for words in (
        "Compression & co",
        "<kv-cat>",
        "5 windows",
        "768 tokens",
        "ΔPPL under Attention Matching",
        "0.780 → 0.461",
        '"seeds"',
    ):
        assert words in text, words
    # 3 metrics for each of two models, and both models for each of two compressors
    assert sum(1 for line in re.findall(r"<svg [^>]*role=\"img\"", source)) == 8
    assert "prefers-color-scheme: dark" in source and 'name="viewport"' in source


def test_figures_of_the_table_are_the_rows(page):
    row = next(r for r in rows_of("base") if r["compressor"] == "attention-matching" and r["keep"] == 0.1)
    line = next(
        x for x in page[1].read_text().splitlines() if x.startswith("| base | attention-matching | 10 %")
    )
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == "76.8" and cells[4] == f"{1e6 / 2**20:.2f}"
    assert cells[6] == f"{row['delta_ppl']:.3f} ± {row['delta_ppl_se']:.3f}"
    assert cells[8].startswith(f"{row['top1']:.1f} ± ")


def test_before_and_after_are_paired(page):
    """Windows differ much more than the models do: only the paired error shows the difference as clear."""
    source = page[0].read_text()
    table = source[source.index("base → &lt;kv-cat&gt;") :]
    assert 'class="better"' in table[: table.index("</table>")]
    line = next(x for x in page[1].read_text().splitlines() if x.startswith("| attention-matching at 5 %"))
    _, before, after, change, ratio = (x.strip() for x in line.strip("|").split("|"))
    size, error = map(float, change.split(" ± "))
    assert size == pytest.approx(float(after.split()[0]) - float(before.split()[0]), abs=2e-3)
    assert error < float(before.split(" ± ")[1]) and float(ratio) > 1.5


def curve(count, decades, *, error=0.0):
    """Points whose values fall by so many decades, at budgets from 1 % to 100 %."""
    keeps = [0.01 * 100 ** (i / (count - 1)) for i in range(count)]
    values = [10 ** (6 - decades * i / (count - 1)) for i in range(count)]
    return [Point(x, y, y * error) for x, y in zip(keeps, values, strict=True)]


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("decades", [0, 0.4, 1.5, 3, 14])
@pytest.mark.parametrize("error", [0, 2])
def test_labels_of_an_axis_do_not_overlap_and_cover_the_points(count, decades, error):
    points = curve(count, decades, error=error)
    ticks = {"x_ticks": [p.x for p in points], "x_log": True}
    figure, _ = draw([Series("a", points)], x_label="kept slots", y_label="ΔPPL", **ticks)
    (axes,) = figure.axes
    for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
        shown = [x for x in axis.get_ticklabels() if x.get_visible() and x.get_text()]
        ends = sorted(tuple(x.get_window_extent().get_points()[:, side]) for x in shown)
        inside = [e for e in ends if e[0] >= 0 and e[1] <= (480, 320)[side]]
        assert all(a[1] < b[0] for a, b in zip(ends, ends[1:], strict=False)) and len(inside) >= 2
    low, high = axes.get_ylim()
    assert all(low <= p.y and p.y + p.error <= high for p in points)
    assert axes.get_yscale() == ("log" if decades > math.log10(20) else "linear")


def test_a_chart_places_its_points_in_order_and_leaves_out_what_is_not_finite():
    svg = line_chart(
        [Series("a & b", [Point(2, 1.0), Point(1, 4.0, 0.5), Point(3, math.nan)])], x_label="x", y_label="y"
    )
    (path,) = re.findall(r'<g class="line s0"><title>a &amp; b</title> <path d="([^"]+)"', svg)
    (x1, y1), (x2, y2) = (map(float, p.split()) for p in re.findall(r"[ML] ([\d.]+ [\d.]+)", path))
    assert x1 < x2 and y1 < y2  # SVG's y goes down: 4 stands above 1
    assert re.findall(r"<title>(a &amp; b: .*?)</title>", svg) == [
        "a &amp; b: 4 ± 0.5 at 1",
        "a &amp; b: 1 at 2",
    ]
    assert not re.search(r"#0a0[bc]|DejaVu|<metadata|<!--", svg) and "var(--s0)" in svg
    with pytest.raises(ValueError, match="no finite value"):
        line_chart([Series("a", [Point(0, math.inf)])], x_label="x", y_label="y")


def test_charts_of_a_page_share_no_ids(page):
    ids = re.findall(r' id="([^"]+)"', page[0].read_text())
    assert ids and len(set(ids)) == len(ids)


def test_numbers():
    assert number(None) == number(math.nan) == "–" and number(12345.6) == "12,346"
    assert with_error(26.97, 5.29) == "26.97 ± 5.29" and with_error(0.1234, None) == "0.123"
    assert difference(-1.0, 0.1, lower_is_better=True).better is True
    assert difference(1.0, 0.1, lower_is_better=True).better is False
    assert difference(0.1, 0.1, lower_is_better=True).better is None


def test_protocols_without_a_section_of_their_own_get_a_table(tmp_path):
    write(
        tmp_path,
        [{"model": "m", "accuracy": 0.5, "accuracy_se": 0.1, "items": [1], "seen": True}],
        "my-protocol",
    )
    text = write_report([tmp_path], tmp_path / "x.html", title="t")[1].read_text()
    assert "## My protocol" in text and "| m | 0.500 ± 0.100 | yes |" in text


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        read_results(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no results.json there; did the evaluation finish\?"):
        read_results(tmp_path / "empty")
    (tmp_path / "results.json").write_text('{"protocol": "continuation", "rows": [')
    with pytest.raises(ValueError, match="not a results file"):
        read_results(tmp_path)
    one, two = write(tmp_path / "1", rows_of("a")), write(tmp_path / "2", rows_of("b"), data="other")
    with pytest.raises(ValueError, match="on different data cannot stand in one table"):
        write_report([one, two], tmp_path / "x.html", title="t")
    assert not (tmp_path / "x.html").exists()
    result = CliRunner().invoke(main, ["report", str(one), str(two), "--out", str(tmp_path / "x.html")])
    assert result.exit_code == 1 and result.output.startswith("Error: ")
    good = CliRunner().invoke(main, ["report", str(one), "--out", str(tmp_path / "x.html")])
    assert good.exit_code == 0 and (tmp_path / "x.html").is_file() and (tmp_path / "x.md").is_file()


def browser():
    """A headless browser; .ci/run installs one, so that there its absence is a failure."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("no browser: .ci/run installs chromium")
        pytest.skip("no chromium here: the page is not looked at (apt-get install chromium)")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_it(page, tmp_path, scheme, width):
    """Nothing is wider than the screen, all charts have a size, text stands out from the page."""
    probe = """
    <script>
    const rgb = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = c => { const f = rgb(c).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                         return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
    const page = light(getComputedStyle(document.body).backgroundColor);
    const contrast = e => { const l = light(getComputedStyle(e).color); return (Math.max(l, page) + 0.05) / (Math.min(l, page) + 0.05); };
    const charts = [...document.querySelectorAll('figure > svg')].map(e => e.getBoundingClientRect());
    document.title = JSON.stringify({
      page: page, overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      charts: charts.length, narrowest: Math.min(...charts.map(r => r.width)), lowest: Math.min(...charts.map(r => r.height)),
      columns: new Set(charts.map(r => Math.round(r.left))).size,
      text: Math.min(...[...document.querySelectorAll('h1, h2, p, th, td, figcaption, li')].map(contrast)),
      lines: Math.min(...[...document.querySelectorAll('.line')].map(contrast)),
    });
    </script></body>"""
    file = tmp_path / "probe.html"
    file.write_text(page[0].read_text().replace("</body>", probe))
    picture = tmp_path / f"{scheme}-{width}.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    shot = [browser(), *options, *dark, f"--window-size={width},1400"]
    subprocess.run(
        [*shot, f"--screenshot={picture}", file.as_uri()], check=True, capture_output=True, timeout=120
    )
    done = subprocess.run(
        [*shot, "--dump-dom", file.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", done.stdout).group(1))
    assert found["overflow"] <= 0 and found["charts"] == 8
    assert found["narrowest"] > 280 and found["lowest"] > 150
    assert found["columns"] == (1 if width == 500 else 3)
    assert found["page"] < 0.05 if scheme == "dark" else found["page"] > 0.9
    assert found["text"] > 4.5 and found["lines"] > 3  # WCAG AA
    assert picture.stat().st_size > 20_000


def asked_rows(kind, tags, item, *, models=("base", "kv-cat")):
    """Rows as the question protocols make them: their own figures of made-up answers."""
    rows = []
    for model in models:
        for compressor, keep in (("none", 1.0), ("attention-matching", 0.1), ("attention-matching", 0.4)):
            for tag in tags:
                items = [item(keep, i) for i in range(4)]
                head = {
                    "model": model,
                    "compressor": compressor,
                    "keep": keep,
                    "question_aware": False,
                    **tag,
                }
                figures = kind.figures(items, [None] * 4)
                rows.append(
                    {**head, "items": 4, **figures, "slots": 100 * keep, "bytes": 1000, "seconds": 1.0}
                )
    return rows


def test_needle_has_curves_a_heat_map_and_the_papers_figures(tmp_path):
    from kvcat_nemo.evaluate.needle import Needle

    tags = [{"length": 1024, "depth": depth} for depth in (0, 0.5, 1, "all")]
    kind = Needle.__new__(Needle)
    rows = asked_rows(kind, tags, lambda keep, i: {"exact": i < 4 * keep, "first": 0.5, "nll": 1.0})
    page, text = write_report([write(tmp_path, rows, "needle")], tmp_path / "x.html", title="t")
    source = page.read_text()
    assert source.count('class="map"') == 2  # one for each model: one compressor, one length
    cells = re.findall(r'class="heat[^"]*" style="--v:([\d.]+)">(\d+)<', source)
    assert {float(v) * 100 for v, _ in cells} == {float(n) for _, n in cells} == {25.0, 50.0}
    assert (
        "never saw the question" in source
        and "34" in source
        and "| Qwen2.5-0.5B | 23 → 34 |" in text.read_text()
    )
    assert "| base | full cache | 100 % | 1024 | all | 100.0" in text.read_text()


def test_tasks_get_a_chart_each(tmp_path):
    from kvcat_nemo.evaluate.long_qa import LongQA
    from kvcat_nemo.evaluate.ruler import Ruler

    tags = [{"task": task, "length": 512} for task in ("niah-single", "average")]
    item = lambda keep, i: {"found": 1 + (keep > 0.2), "wanted": 2}  # noqa: E731
    rows = asked_rows(Ruler.__new__(Ruler), tags, item)
    source = write_report([write(tmp_path / "r", rows, "ruler")], tmp_path / "r.html", title="t")[
        0
    ].read_text()
    assert source.count("<figcaption>task ") == 2 and source.index("task average") < source.index(
        "task niah-single"
    )

    kind = LongQA.__new__(LongQA)
    kind.questions = "qasper"
    item = lambda keep, i: {"chosen": 0, "right": i % 2, "nll": 1.0, "scores": [0.0, 1.0]}  # noqa: E731
    rows = asked_rows(kind, [{}], item)
    text = write_report([write(tmp_path / "q", rows, "long-qa")], tmp_path / "q.html", title="t")[
        1
    ].read_text()
    assert "balanced accuracy, %" in text and "| kv-cat | attention-matching | 40 % | 50.0" in text


def test_base_ability_shows_the_paired_difference(tmp_path):
    rows = [
        {"model": "base", "task": "piqa", "n": 9, "accuracy": 60.0, "accuracy_se": 5.0},
        {"model": "kv", "task": "piqa", "n": 9, "accuracy": 70.0, "accuracy_se": 5.0},
        {
            "model": "kv",
            "before": "base",
            "task": "piqa",
            "n": 9,
            "difference": 10.0,
            "difference_se": 2.0,
            "p": 0.1,
        },
    ]
    page, text = write_report([write(tmp_path, rows, "base-ability")], tmp_path / "x.html", title="t")
    assert "| piqa | 9 | 60.0 ± 5.0 | 70.0 ± 5.0 | +10.0 ± 2.0 | 70.4 → 72.1 |" in text.read_text()
    assert '<td class="better">+10.0' in page.read_text()


def test_gradient_curves_say_when_the_first_models_end_was_reached(tmp_path):
    from kvcat_nemo.evaluate.gradient_curve import speed_up

    def row(model, curve):
        head = {"model": model, "compressor": "recent", "keep": 0.05, "question_aware": False}
        ends = {"delta_ppl_start": curve[0], "delta_ppl": curve[-1], "delta_ppl_se": 0.1, "steps": 4}
        return {**head, **ends, "step": [0, 1, 2, 4], "delta_ppl_by_step": curve}

    base, trained = row("base", [4.0, 3.0, 2.0, 1.0]), row("kv", [3.0, 0.9, 0.8, 0.7])
    trained |= speed_up(base, trained)
    page, text = write_report([write(tmp_path, [base, trained], "gradient")], tmp_path / "x.html", title="t")
    assert "| kv | recent | 5 % | 3.000 | 0.700 ± 0.100 | 4 | 1 | 4.00 × |" in text.read_text()
    assert page.read_text().count('<g class="line s') == 2
