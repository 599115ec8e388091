"""The committed continuation table: what its script checks, and that its sweep can be run."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import continuation  # noqa: E402


def row(keep, delta, compressor="a"):
    return {name: 0.0 for name in continuation.COLUMNS} | {
        "model": "m", "compressor": compressor, "budget": str(keep), "keep": keep, "delta_ppl": delta, "nll_by_window": [1 / 3],
    }  # fmt: skip


def results(rows, **manifest):
    return {"rows": rows, "manifest": {"data": "d", "settings": {}, "models": {"m": {"fingerprint": "f"}}} | manifest}


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
