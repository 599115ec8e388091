"""The committed figures of the parallel matrix are of the cases there are, within tolerance; the page says the same."""

import json
from pathlib import Path

import pytest

from benchmarks import parallel_matrix, parallel_page
from tests.engine.matrix_cases import CASES, FORMS

ROOT = Path(__file__).resolve().parents[2]

HINT = "stale: run make matrix (or python -m benchmarks.parallel_matrix --only NAME)"


@pytest.fixture(scope="module")
def report():
    return json.loads(parallel_matrix.OUT.read_text())


def test_every_case_was_measured_as_it_is(report):
    described = [parallel_matrix.described(c) for c in CASES]
    keys = described[0].keys()
    assert [{k: r[k] for k in keys} for r in report["cases"]] == json.loads(json.dumps(described)), HINT
    assert {"git_revision", "versions", "seconds", "machine"} <= report["manifest"].keys()


def test_every_case_is_within_its_tolerance(report):
    for r in report["cases"]:
        assert r["wrong"] == [] and r["largest"] <= r["tolerance"], r["case"]
        assert r["figures"] and r["gradients"] and r["norms"]
        assert r["tolerance"] <= 1e-10 or r["reason"] != CASES[0].reason, f"{r['case']}: say why"
        routed = any("router." in kind for kind in r["gradients"])
        assert routed == r["recipe"]["model"].startswith("router"), r["case"]


def test_the_page_is_up_to_date():
    page = parallel_page.PAGE.read_text(encoding="utf-8")
    assert parallel_page.rendered(page) == page, HINT
    assert "not measured" not in page, HINT
    with pytest.raises(ValueError, match="matrix: refused"):
        parallel_page.rendered(page.replace("<!-- matrix: refused -->", ""))


def test_cases_have_names_of_their_own_and_every_form_has_cases():
    assert len({c.name for c in CASES}) == len(CASES)
    for form, belongs in FORMS.items():
        assert any(belongs(c) for c in CASES), form
        assert any(belongs(c) and c.short for c in CASES), f"{form}: no case of it in make test"


def test_prose_stays_where_tables_are_empty():
    """Also on a page whose tables were never made."""
    page = "a\n" + "".join(
        f"<!-- matrix: {name} -->\n<!-- end -->\nafter {name}\n" for name in parallel_page.BLOCKS
    )
    made = parallel_page.rendered(page)
    assert all(f"<!-- end -->\nafter {name}\n" in made for name in parallel_page.BLOCKS)
    assert parallel_page.rendered(made) == made and made.count("|---") >= len(parallel_page.BLOCKS)


def test_only_replaces_what_it_names(tmp_path, monkeypatch):
    """A run of some cases keeps the others' figures, in the cases' order, unless they are of another training."""
    out = tmp_path / "matrix.json"
    kept = json.loads(json.dumps(parallel_matrix.described(CASES[3]))) | {"mark": 1, "wrong": []}
    other = json.loads(json.dumps(parallel_matrix.described(CASES[4]))) | {"recipe": {"model": "of old"}}
    out.write_text(json.dumps({"manifest": {}, "cases": [other, kept | {"tolerance": 1.0}]}))
    monkeypatch.setattr(
        parallel_matrix, "run_cases", lambda cases, *a, **k: {c.name: ([], {}) for c in cases}
    )
    found = parallel_matrix.Difference(figures={"loss/total": 1e-3}, norms={"routers": 0.0})
    found.gradients = {
        "0+decoder.layers.1.mlp.linear_fc2.weight": 2e-12,
        "2+decoder.layers.0.mlp.linear_fc2.weight": 1e-12,
        "0+embedding.word_embeddings.weight": 0.0,
    }
    monkeypatch.setattr(parallel_matrix, "difference", lambda *a: found)
    name = CASES[0].name
    assert parallel_matrix.main(["--only", name, "--out", str(out)]) == 1
    first, second = json.loads(out.read_text())["cases"]
    assert second == kept and first["case"] == name
    assert first["gradients"] == {"mlp.linear_fc2.weight": 2e-12, "embedding.word_embeddings.weight": 0.0}
    assert first["wrong"] == ["figure loss/total is off by 0.001 (allowed: 1e-10)"]
    with pytest.raises(SystemExit, match="no case begins so"):
        parallel_matrix.main(["--only", "no such", "--out", str(out)])
