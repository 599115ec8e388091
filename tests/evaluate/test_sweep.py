"""Sweeps and the commands: checked as a whole, then run."""

import json

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.evaluate.sweep import load_sweep
from kvcat_nemo.evaluate.windows import Window, write_windows
from tests.evaluate.killed_runs import kill_after, run_sweep
from tests.support.hf_models import tokens


@pytest.fixture
def folder(tmp_path, model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_windows([Window("t", str(i), 0, tokens(52, seed=i)) for i in range(3)], "windows.json")
    (tmp_path / "tiny").symlink_to(model_dir)
    return tmp_path


GOOD = """
out: sweep
shared: {models: [tiny], windows: windows.json, prefix: 40, continuation: 12, threads: 1}
runs:
  - {protocol: continuation, compressors: "random,recent", keep: 0.25}
  - {protocol: continuation, name: bf16, dtype: bfloat16, compressors: [recent], keep: [0.25, 10t], limit: 1}
"""


def kvcat(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def test_a_sweep_runs_all_and_again_nothing(folder):
    (folder / "sweep.yaml").write_text(GOOD)
    done = kvcat("evaluate", "sweep", "sweep.yaml", "--dry-run")
    assert done.exit_code == 0 and "bf16" in done.output and not (folder / "sweep").exists()
    done = kvcat("evaluate", "sweep", "sweep.yaml")
    assert done.exit_code == 0, done.output
    files = [folder / "sweep" / name / "results.json" for name in ("continuation", "bf16")]
    rows = [
        [(r["compressor"], r["budget"], r["windows"]) for r in json.loads(f.read_text())["rows"]]
        for f in files
    ]
    assert rows[0] == [("none", "1", 3), ("random", "0.25", 3), ("recent", "0.25", 3)]
    assert rows[1] == [("none", "1", 1), ("recent", "0.25", 1), ("recent", "10t", 1)]
    before = [f.read_bytes() for f in files]
    assert kvcat("evaluate", "sweep", "sweep.yaml").exit_code == 0
    assert [json.loads(f.read_bytes())["rows"] for f in files] == [json.loads(b)["rows"] for b in before]
    assert list(load_sweep("sweep.yaml", only=["bf16"])) == ["bf16"]


def test_a_killed_sweep_gives_the_files_of_an_unbroken_one(folder):
    def rows(out):
        found = {
            f.parent.name: json.loads(f.read_text())["rows"] for f in folder.glob(f"{out}/*/results.json")
        }
        for row in (row for rows in found.values() for row in rows):
            row.pop("seconds")
        return found

    for name in ("whole", "sweep"):
        (folder / f"{name}.yaml").write_text(GOOD.replace("out: sweep", f"out: {name}"))
    assert kvcat("evaluate", "sweep", "whole.yaml").exit_code == 0
    kill_after(4, folder / "sweep", run_sweep, "sweep.yaml")  # of 9 in the first run
    assert not rows("sweep")
    kill_after(10, folder / "sweep", run_sweep, "sweep.yaml")  # in the second
    assert list(rows("sweep")) == ["continuation"]
    assert kvcat("evaluate", "sweep", "sweep.yaml").exit_code == 0
    assert rows("sweep") == rows("whole") and len(rows("sweep")) == 2


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("out: sweep", "", "out is missing"),
        ("out: sweep", "out: sweep\nmodels: [tiny]", "'models' is not known at the top"),
        ("threads: 1", "thread: 1", "shared: 'thread' is a setting of none of the runs"),
        ("keep: 0.25}", "keeps: 0.25}", "run 'continuation': 'keeps' is not a setting of continuation; did you mean keep"),
        ("limit: 1", "limit: one", "run 'bf16': limit='one': must be int or nothing, is str"),
        ("limit: 1", "out: there", "run 'bf16': 'out' is the sweep's"),
        ("name: bf16, ", "", "name 'continuation' is taken"),
        ("name: bf16", "name: a/b", "name 'a/b'"),
        ("{protocol: continuation, name", "{protocol: continuations, name", "did you mean continuation"),
        ("{protocol: continuation, name", "{name", "run 2: must hold `protocol`"),
        ("runs:", "runs: [", "not YAML"),
        ("recent]", "recnt]", "compressor 'recnt': choose among"),
        ("0.25, 10t", "0.25, 0.001", "keeps nothing"),
        ("[tiny]", "[tinny]", "model 'tinny': no such folder"),
        ("windows.json", "wndows.json", "no such file"),
        ("models: [tiny], ", "", "continuation: models is missing"),
        ("bfloat16", "float8", "dtype='float8'"),
    ],
)  # fmt: skip
def test_a_bad_sweep_is_refused_before_any_work(folder, old, new, message):
    assert GOOD.count(old) >= 1
    (folder / "sweep.yaml").write_text(GOOD.replace(old, new))
    done = kvcat("evaluate", "sweep", "sweep.yaml")
    assert done.exit_code == 1 and message in " ".join(done.output.split()), done.output
    assert "Traceback" not in done.output and not (folder / "sweep").exists()


def test_only_and_missing_files(folder):
    (folder / "sweep.yaml").write_text(GOOD)
    done = kvcat("evaluate", "sweep", "sweep.yaml", "--only", "bf17")
    assert done.exit_code == 1 and "no run is called 'bf17'" in done.output
    done = kvcat("evaluate", "sweep", "nowhere.yaml")
    assert done.exit_code == 1 and "no such file" in done.output


def test_continuation_command(folder):
    words = (
        "evaluate",
        "continuation",
        "b=tiny",
        "--windows",
        "windows.json",
        "--prefix",
        40,
        "--continuation",
        12,
    )
    words += ("--compressors", "random,random+int8", "--keep", "0.25,16t", "--out", "out", "--threads", 1)
    done = kvcat(*words, "--dry-run")
    assert done.exit_code == 0 and "5 rows, 15 passes" in done.output and not (folder / "out").exists()
    done = kvcat(*words)
    assert done.exit_code == 0, done.output
    rows = json.loads((folder / "out" / "results.json").read_text())["rows"]
    assert [(r["model"], r["compressor"], r["keep"]) for r in rows] == [
        ("b", "none", 1), ("b", "random", 0.25), ("b", "random", 0.4), ("b", "random+int8", 0.25), ("b", "random+int8", 0.4),
    ]  # fmt: skip
    assert "delta_ppl" in done.output and "random+int8" in done.output
    done = kvcat(*words, "--dtype", "bfloat16")
    assert done.exit_code == 1 and "dtype: float32 there, bfloat16 now" in " ".join(done.output.split())
    done = kvcat("evaluate", "continuation", "nowhere", "--out", "out")
    assert done.exit_code == 1 and "model 'nowhere': no such folder" in done.output
