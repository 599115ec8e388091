"""benchmarks/study: plans, refusals, and what its parts compute; at the end the chain itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_other_settings_are_not_mixed_in(tmp_path):
    from benchmarks.study.pool import finished

    job = {"out": str(tmp_path), "seed": 1, "threads": 1}
    assert not finished(tmp_path, job)
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert not finished(tmp_path, job | {"threads": 2})  # decides no figure
    with pytest.raises(ValueError, match="another seed"):
        finished(tmp_path, job | {"seed": 2})


def test_smoke_never_becomes_evidence(tmp_path):
    from benchmarks.study.page import write_page

    report = {"scale": "smoke", "evidence": False}
    with pytest.raises(ValueError, match="no evidence"):
        write_page([report], tmp_path / "evidence.md", evidence_page=tmp_path / "evidence.md")


def test_plans():
    from benchmarks.study.jobs import ablation_jobs, policy_jobs
    from benchmarks.study.scales import FULL, SCALES
    from kvcat_nemo.data.assets import registry_assets
    from kvcat_nemo.method.config import KVCatConfig

    for scale in SCALES.values():
        jobs = policy_jobs(scale) + ablation_jobs(scale)
        assert len({j.name for j in jobs}) == len(jobs)
        for job in jobs:
            KVCatConfig(**job.kvcat).group_starts(scale.shape.layers)
        by_seed = {}
        for job in policy_jobs(scale):
            by_seed.setdefault(job.seed, set()).add((job.training, job.seed))
        assert all(len(same) == 1 for same in by_seed.values())  # equal tokens in equal order
    assert 4e6 <= FULL.shape.parameters <= 10e6 and set(FULL.corpora) <= set(
        registry_assets("corpora").CORPORA
    )
    assert len(FULL.seeds["none"]) >= 3 and len(FULL.seeds["router"]) >= 3
    names = [j.group for j in policy_jobs(FULL)]
    assert names == ["none", "router"] * 3 + [
        "random",
        "attention",
    ]  # short of time, what is compared is there


def test_a_windows_place_depends_on_step_and_seed_alone(tmp_path):
    from benchmarks.study.windows import TokenWindows

    class Fixed(TokenWindows):
        def __init__(self, tokens, length):
            self.tokens, self.stream = tokens, np.arange(length)

    data = Fixed(8, 100)
    first = [data.batch(step, 3, seed=1)[0] for step in range(12)]
    again = Fixed(8, 100)
    for step in (7, 2, 11):  # as a resumed run asks
        assert again.batch(step, 3, seed=1)[0].equal(first[step])
    assert not again.batch(0, 3, seed=2)[0].equal(first[0])
    inputs, labels = data.batch(0, 3, seed=1)
    assert labels.equal(inputs + 1) and inputs.shape == (3, 8)
    epoch = len(data)
    begins = [int(window[0]) for batch in first for window in batch][:epoch]
    assert len(set(begins)) == epoch and len({b % 8 for b in begins}) == 1  # each once


def rows(model, harm, compressor="attention-matching"):
    dense = [3.0, 3.2, 2.9, 3.1, 3.3, 3.0, 2.8]
    return {
        "model": model,
        "compressor": compressor,
        "budget": "0.1",
        "keep": 0.1,
        "delta_ppl": harm * 10,
        "kl": harm,
        "top1": 90.0,
        "ppl_dense": 20.0,
        "nll_by_window": [d + harm * (1 + 0.1 * i) for i, d in enumerate(dense)],
        "nll_dense_by_window": dense,
    }


def test_groups_against_the_control():
    from benchmarks.study.summary import compare

    table = [rows("n1", 0.10), rows("n2", 0.11), rows("r1", 0.05), rows("r2", 0.06), rows("x1", 0.105)]
    out = {
        r["group"]: r for r in compare(table, {"none": ["n1", "n2"], "router": ["r1", "r2"], "odd": ["x1"]})
    }
    router = out["router"]
    assert router["difference"] == pytest.approx(-0.5) and router["ratio"] == pytest.approx(1.05 / 0.55)
    assert router["beyond_seeds"] is True and router["p"] == pytest.approx(2 / 2**7)
    assert router["excess_loss_difference"] == pytest.approx(-0.05 * 1.3)
    assert out["odd"]["beyond_seeds"] is None and "difference" not in out["none"]
    noisy = [rows("n1", 0.10), rows("n2", 0.20), rows("r1", 0.05), rows("r2", 0.18)]
    out = {r["group"]: r for r in compare(noisy, {"none": ["n1", "n2"], "router": ["r1", "r2"]})}
    assert out["router"]["beyond_seeds"] is False


def test_runs_of_one_seed_are_compared_with_one_another():
    from benchmarks.study.summary import compare

    names = {"none": ["none-seed1", "none-seed2"], "router": ["router-seed2", "router-seed1"]}
    table = [
        rows("none-seed1", 0.10),
        rows("none-seed2", 0.30),
        rows("router-seed1", 0.08),
        rows("router-seed2", 0.27),
    ]
    router = next(r for r in compare(table, names) if r["group"] == "router")
    assert router["by_seed"]["values"] == pytest.approx([-0.3, -0.2])
    assert router["beyond_seeds"] is False and router["by_seed"]["n"] == 2


def test_dense_perplexity_is_compared_by_seed():
    from benchmarks.study.summary import dense

    control = {"none-seed1": [3.0, 3.2, 2.8], "none-seed2": [3.1, 3.3, 2.9], "base": [3.0, 3.0, 3.0]}
    worse = {f"router-seed{i}": [x + 0.01 * i for x in control[f"none-seed{i}"]] for i in (1, 2)}
    models = {name: {"nll_by_window": each} for name, each in (control | worse).items()}
    measured = {"settings": {"windows": 3, "tokens": 8}, "models": models}
    names = {
        "base": ["base"],
        "none": ["none-seed1", "none-seed2"],
        "router": ["router-seed1", "router-seed2"],
    }
    out = dense(measured, names)
    assert out["windows"] == 3 and out["groups"]["base"]["perplexity"]["mean"] == pytest.approx(np.exp(3.0))
    percent = out["groups"]["router"]["percent"]["values"]
    assert percent == pytest.approx([100 * (np.exp(0.01) - 1), 100 * (np.exp(0.02) - 1)])
    assert out["groups"]["router"]["p"] == pytest.approx(0.25) and "p" not in out["groups"]["none"]
    del measured["models"]["router-seed2"]  # not measured yet
    assert dense(measured, names)["groups"]["router"]["percent"]["n"] == 1


def test_whether_compressibility_can_be_measured_at_all():
    from benchmarks.study.summary import measurable

    table = [rows("base", 0.1), rows("base", 0.5, "random"), rows("r1", 0.9, "random")]
    assert measurable(table, "base") == [
        {"keep": "0.1", "random": 5.0, "attention-matching": 1.0, "ratio": 5.0}
    ]


def test_gradient_curves_count_to_the_controls_mean_end():
    from benchmarks.study.summary import gradient_curves

    def row(model, curve):
        end = {"delta_ppl_start": curve[0], "delta_ppl": curve[-1], "delta_ppl_by_step": curve}
        return {"model": model, "budget": "0.1", "keep": 0.1, "steps": 4, "step": [0, 1, 2, 3, 4]} | end

    rows = [
        row("n1", [9, 6, 5, 4, 3]),
        row("n2", [9, 7, 6, 5, 5]),
        row("r1", [9, 4, 3, 2, 1]),
        row("r2", [9, 8, 8, 7, 6]),
    ]
    control, router = gradient_curves(rows, {"none": ["n1", "n2"], "router": ["r1", "r2"]})
    assert control["target"] == router["target"] == 4
    assert router["speed_up"] == [4.0, None] and router["curve"] == [9, 6, 5.5, 4.5, 3.5]


def test_what_routers_keep_is_told_by_kind_of_token(tmp_path):
    from benchmarks.study.masks import FILE, KINDS, kinds_of, structure

    pieces = [" the", "ing", "42", ".", "\n"]
    assert [KINDS[i] for i in kinds_of(pieces)] == list(KINDS)
    tokens = np.array([[0, 1, 2, 3, 4, 0]])
    gates = np.array([[[1, 0, 1, 0, 0, 1]], [[0, 1, 0, 1, 1, 0]]], dtype=bool)
    np.savez(tmp_path / FILE, tokens=tokens, gates=gates)
    found = structure(tmp_path / FILE, pieces)
    assert found["kept"] == [0.5, 0.5]
    assert found["by_kind"]["word start"] == {"share": 1 / 3, "kept": [1.0, 0.0]}
    assert found["by_kind"]["seen before in the window"] == {"share": 1 / 6, "kept": [1.0, 0.0]}
    assert found["by_kind"]["slot 0"]["kept"] == [1.0, 0.0]
    assert found["correlation"][0][1] == pytest.approx(-1)


def test_needle_accuracy_over_all_depths_by_group():
    from benchmarks.study.summary import needle

    cell = {"compressor": "none", "budget": "1", "keep": 1.0, "nll": 1.0}
    rows = [cell | {"model": m, "depth": d, "accuracy": a} for m, d, a in
            [("a1", "0.5", 0.0), ("a1", "all", 50.0), ("a2", "all", 100.0), ("b", "all", 25.0)]]  # fmt: skip
    a, b = needle(rows, {"a": ["a1", "a2"], "b": ["b"]})
    assert a["accuracy"]["values"] == [50.0, 100.0] and b["accuracy"]["mean"] == 25.0


def test_the_readmes_table_is_the_committed_one():
    report = json.loads((ROOT / "benchmarks" / "study" / "full.json").read_text("utf-8"))
    cells = {(r["compressor"], r["keep"], r["group"]): r["delta_ppl"] for r in report["continuation"]}
    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme.partition("| compressor | kept | control | router | |\n")[2].partition("\n\n")[0]
    names = {"Attention Matching": "attention-matching", "H2O": "h2o", "SnapKV": "snapkv"}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[1:]]
    assert len(lines) == 4
    for name, kept, *told, change in lines:
        control, router = (
            cells[names[name], int(kept.split()[0]) / 100, group] for group in ("none", "router")
        )
        assert told == [f"{x['mean']:.3f} ± {x['sd']:.3f}" for x in (control, router)]
        assert change == f"−{100 * (1 - router['mean'] / control['mean']):.0f} %"
    percent = report["dense"]["groups"]["router"]["percent"]["mean"]
    assert f"dense perplexity +{percent:.2f} %" in readme


def test_dense_perplexity_is_what_transformers_computes(tmp_path, monkeypatch):
    from benchmarks.study import dense
    from tests.support.hf_models import small_model

    models = {name: small_model(seed=seed, vocab_size=50) for seed, name in enumerate("ab")}
    tokens = torch.randint(0, 50, (3, 9))
    loaded = []

    class Windows:
        def __init__(self, *_):
            pass

        def spread(self, count):
            return tokens[:count, :-1], tokens[:count, 1:]

    monkeypatch.setattr(dense, "TokenWindows", Windows)
    monkeypatch.setattr(dense, "find_model", lambda folder: folder)
    monkeypatch.setattr(dense, "weights_fingerprint", lambda folder: f"weights of {folder}")
    monkeypatch.setattr(
        dense, "load_model", lambda folder: loaded.append(str(folder)) or (models[str(folder)],)
    )
    monkeypatch.setattr(dense, "set_threads", lambda threads: None)
    out = tmp_path / "dense.json"

    def measure(names, count):
        dense.measure({name: Path(name) for name in names}, tmp_path, 8, count, out)

    measure("a", 3)
    measure("ab", 3)
    assert loaded == ["a", "b"]  # what is measured is not measured again
    with torch.inference_mode():
        for name, facts in json.loads(out.read_text())["models"].items():
            expected = [models[name](row[None], labels=row[None]).loss.item() for row in tokens]
            assert facts["nll_by_window"] == pytest.approx(expected, rel=1e-5)
    measure("a", 2)  # other windows: nothing of before may stand beside it
    assert [len(m["nll_by_window"]) for m in json.loads(out.read_text())["models"].values()] == [2]


@pytest.mark.slow
def test_the_chain_from_text_to_page(tmp_path):
    """Every stage at the smoke scale, as a user runs it; a second start makes nothing again."""
    command = [sys.executable, "-m", "benchmarks.study", "--smoke", "--out", str(tmp_path / "smoke")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run():
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)

    first = run()
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    report = json.loads((tmp_path / "smoke" / "results.json").read_text())
    groups = {"none", "random", "router"}
    assert set(report["training"]) == groups and {r["group"] for r in report["gradient"]} == groups
    assert {r["group"] for r in report["continuation"]} == groups | {"base"}
    assert {r["group"] for r in report["needle"]} == groups | {"base"}
    assert len(report["masks"]["router-seed1"]["kept"]) == 4
    assert report["ablations"]["not_run"] == []
    page = (tmp_path / "smoke" / "evidence.md").read_text()
    assert "None of its figures is evidence" in page
    for picture in re.findall(r"\]\((img/[^)]*)\)", page):
        assert (tmp_path / "smoke" / picture).read_bytes().startswith(b"\x89PNG")
    assert list(report["dense"]["groups"]) == ["base", "none", "router", "random"]
    assert "### Over the full cache" in page
    again = run()
    assert again.returncode == 0 and "starts" not in again.stdout
