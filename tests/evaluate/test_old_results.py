"""Results folders of an earlier version: what they hold is taken as measured, or they are refused by version."""

from __future__ import annotations

import json

import pytest

from kvcat_nemo.evaluate import harness, protocol
from kvcat_nemo.evaluate.models import find_model, model_facts
from kvcat_nemo.evaluate.registry import PROTOCOLS, protocol_class
from kvcat_nemo.evaluate.report import read_results, write_report
from kvcat_nemo.runs.provenance import manifest
from tests.evaluate.old_runs import OLD, RUNS, settings_of, write_inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    for name, text in json.loads(OLD.read_text(encoding="utf-8")).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def as_if_of_these_versions(folder, name, model):
    """The folder as if today's versions had made it, of a model that today's versions drew: the rest stays as it was."""
    file = folder / name / "run.json"
    run = json.loads(file.read_text())
    facts = model_facts(find_model(model))
    run["facts"]["models"]["m"] = {"fingerprint": facts.fingerprint, "tokenizer": facts.tokenizer}
    run["manifest"]["versions"] = manifest()["versions"]
    file.write_text(json.dumps(run))


def alike(now, before):
    """Equal, but for the last digits of sums: numpy 1 and 2 add in another order."""
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(alike(now[k], before[k]) for k in before)
    if isinstance(before, list):
        return len(now) == len(before) and all(map(alike, now, before))
    return now == (pytest.approx(before, rel=1e-12) if isinstance(before, float) else before)


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_measured_again_and_the_rows_are_the_same(name, folder, model_dir, monkeypatch):
    if name == "base-ability":
        pytest.importorskip("lm_eval", reason="lm_eval is in the first environment")

    def loads_a_model(*_):
        raise AssertionError("an item was measured again")

    monkeypatch.setattr(protocol, "load_model", loads_a_model)
    monkeypatch.setattr(harness, "load_model", loads_a_model)
    as_if_of_these_versions(folder, name, model_dir)
    before = json.loads((folder / name / "results.json").read_text())
    path = protocol_class(name).of(settings_of(name, model_dir, folder / name)).run()
    now = json.loads(path.read_text())
    assert [list(row) for row in now["rows"]] == [list(row) for row in before["rows"]]
    assert alike(now["rows"], before["rows"])
    assert now["manifest"]["settings"] == before["manifest"]["settings"]
    assert set(before["manifest"]) <= set(now["manifest"]) | {"resumed_at"}


def test_every_protocol_is_here():
    assert set(RUNS) == set(PROTOCOLS)


def test_folders_of_other_versions_are_refused_by_version(folder, model_dir):
    name = "needle"
    as_if_of_these_versions(folder, name, model_dir)
    run = json.loads((folder / name / "run.json").read_text())
    run["manifest"]["versions"]["torch"] = "1.0"
    (folder / name / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="its results were made otherwise: torch: 1.0 there, .* now"):
        protocol_class(name).of(settings_of(name, model_dir, folder / name)).run()


def test_the_report_reads_them(folder, tmp_path):
    results = [one for name in RUNS for one in read_results(folder / name)]
    assert {one.protocol for one in results} == set(RUNS)
    page, _ = write_report([folder / name for name in RUNS], tmp_path / "page.html", title="t")
    assert page.read_text().count("<section>") == len(RUNS) + 1
