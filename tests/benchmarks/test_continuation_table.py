"""The committed continuation table: what its script checks, and that its sweep can be run."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import continuation

ROOT = Path(__file__).parents[2]


def row(keep, delta, compressor="a"):
    return {name: 0.0 for name in continuation.COLUMNS} | {
        "model": "m", "compressor": compressor, "budget": str(keep), "keep": keep, "delta_ppl": delta, "nll_by_window": [1 / 3],
    }  # fmt: skip


def results(rows, **manifest):
    return {
        "rows": rows,
        "manifest": {"data": "d", "settings": {}, "models": {"m": {"fingerprint": "f"}}} | manifest,
    }


def test_runs_of_the_same_windows_are_merged():
    merged = continuation.merge([results([row(0.1, 1 / 3)]), results([row(0.1, 1 / 3), row(0.2, 0.1)])])
    assert [(r["keep"], r["delta_ppl"]) for r in merged["rows"]] == [(0.1, 0.333333), (0.2, 0.1)]
    assert merged["rows"][0]["nll_by_window"] == [0.333333] and len(merged["manifests"]) == 2
    with pytest.raises(ValueError, match="other windows"):
        continuation.merge([results([]), results([], data="e")])
    with pytest.raises(ValueError, match="models of the same name"):
        continuation.merge([results([]), results([], models={"m": {"fingerprint": "g"}})])


def test_rises_are_found_whatever_the_order():
    rows = [row(0.4, 1.0), row(0.1, 3.0), row(0.2, 0.5), row(0.1, 1.0, "b"), row(0.2, 0.9, "b")]
    (found,) = continuation.rises(rows)
    assert found == "m a: ΔPPL 0.500 at 0.2, 1.000 at 0.4"


def test_its_sweep_names_what_exists(monkeypatch):
    from kvcat_nemo.compress import make
    from kvcat_nemo.evaluate.sweep import load_sweep

    runs = load_sweep(ROOT / "benchmarks" / "continuation.yaml")
    assert list(runs) == ["ours", "matching", "quantised", "kvsculpt", "kvpress"]
    for specification in runs["ours"].compressors:
        make(specification.partition("@")[0])


def test_the_committed_table():
    value = json.loads((ROOT / "benchmarks" / "continuation.json").read_text(encoding="utf-8"))
    rows = value["rows"]
    assert continuation.rises(rows) == []
    assert len({r["ppl_dense"] for r in rows}) == 1 and {r["windows"] for r in rows} == {20}
    assert {"attention-matching", "random", "recent:sinks=4", "h2o"} <= {r["compressor"] for r in rows}


def test_the_readmes_table_is_the_committed_one():
    value = json.loads((ROOT / "benchmarks" / "continuation.json").read_text(encoding="utf-8"))
    delta = {(row["compressor"], row["keep"]): row["delta_ppl"] for row in value["rows"]}
    names = ["attention-matching", "kvzip", "h2o", "snapkv", "rkv", "streaming-llm", "random"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith(("| 5 %", "| 10 %", "| 40 %"))]
    assert len(lines) == 3
    for line, keep in zip(lines, (0.05, 0.1, 0.4), strict=True):
        told = [float(cell.strip(" *")) for cell in line.split("|")[2:-1]]
        assert told == pytest.approx([delta[name, keep] for name in names], rel=5e-3, abs=6e-3)


def test_attention_matching_beats_selection_and_its_authors_code():
    """At 5 and 10 % every selection alone; on the authors' windows, at every budget, their code."""
    value = json.loads((ROOT / "benchmarks" / "continuation.json").read_text(encoding="utf-8"))
    rows = {(row["compressor"], row["keep"]): row for row in value["rows"]}
    selections = {row["compressor"] for row in value["rows"]} - {"none", "kvsculpt"}
    selections = {name for name in selections if not name.startswith(("attention-matching", "int"))}
    for keep in (0.05, 0.1):
        best = min(rows[name, keep]["delta_ppl"] for name in selections)
        assert len(selections) >= 11 and rows["attention-matching", keep]["delta_ppl"] < best

    def perplexity(compressor, keep, count):
        return math.exp(sum(rows[compressor, keep]["nll_by_window"][:count]) / count)

    authors = json.loads(
        (ROOT / "benchmarks" / "attention_matching_authors.json").read_text(encoding="utf-8")
    )
    for row in authors["rows"]:
        ours = perplexity("attention-matching", row["keep"], row["windows"])
        assert ours - perplexity("none", 1, row["windows"]) < row["delta_ppl"], row["keep"]
