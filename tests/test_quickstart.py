"""The quickstart's machinery and the report, without the hours: stages, failing commands, figures, picture."""

import json
import re
import sys

import pytest

from kvcat_nemo import quickstart
from kvcat_nemo.tracking import run_report


def line(kind, step, **values):
    base = {
        "loss/anchor": 3.0,
        "loss/distill": 1.0,
        "keep_rate": 0.5,
        "keep_rate/group0": 0.5,
        "top1_agreement": 0.4,
    }
    weighted = {"weighted/anchor": 3.0, "weighted/distill": 1.0, "weighted/budget": 0.1}
    return {"kind": kind, "step": step} | base | weighted | values


@pytest.fixture
def finished(tmp_path):
    """A run of two steps and its dataset, as training leaves them."""
    run, data = tmp_path / "run", tmp_path / "data"
    (run / "kvcat").mkdir(parents=True)
    data.mkdir()
    timed = {"tokens": 100.0, "peak_memory_bytes": 3e9}
    lines = [
        line("validation", 0, dense_ppl=20.0, masked_ppl=200.0, keep_rate=0.4, tokens=50.0),
        line("train", 1, step_seconds=2.0, **timed),
        line("train", 2, step_seconds=3.0, **timed),
        line("validation", 2, dense_ppl=19.0, masked_ppl=50.0, keep_rate=0.52, tokens=50.0),
    ]
    (run / "kvcat" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    config = {
        "model": {"kvcat": {"seed": 1, "target_keep_fraction": 0.5}},
        "data": {"seed": 2, "base": "a/base"},
    }
    (run / "kvcat" / "config.json").write_text(json.dumps(config))
    fingerprints = {"source": {"fingerprint": "s"}, "tokenizer": {"fingerprint": "t"}, "splits": {}}
    (data / "manifest.json").write_text(json.dumps(fingerprints))
    return run, data


def test_report_has_the_promised_figures(finished, tmp_path):
    run, data = finished
    run_report.write(run, data, tmp_path, stage_seconds={"train": 7.0}, peak_of_children=4_000_000_000)
    out = json.loads((tmp_path / "report.json").read_text())
    assert out["dense_ppl"] == {"before": 20.0, "after": 19.0}
    assert out["masked_ppl"] == {"before": 200.0, "after": 50.0}
    assert out["keep_rate"] == 0.52 and out["steps"] == 2 and out["tokens"] == 200
    assert out["tokens_per_second"] == 200 / 5
    assert out["peak_memory_bytes"] == 4_000_000_000
    assert out["manifest"]["seeds"] == {"data": 2, "kvcat": 1}
    assert out["manifest"]["data"]["fingerprint"] == "s"
    assert "torch" in out["manifest"]["versions"] and "git_revision" in out["manifest"]
    picture = (tmp_path / "losses.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    text = run_report.table(out)
    assert re.search(r"dense held-out perplexity +20\.00 +19\.00 +-5\.0 %", text)
    assert re.search(r"masked held-out perplexity +200\.00 +50\.00 +-75\.0 %", text)


def test_report_refuses_an_unfinished_run(finished, tmp_path):
    run, data = finished
    path = run / "kvcat" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="no validation at step 0 and at the last step, 2"):
        run_report.write(run, data, tmp_path, stage_seconds={})
    assert not (tmp_path / "report.json").exists()


def test_a_stage_is_run_once_and_again_when_its_key_changes(tmp_path, capsys):
    result, calls = tmp_path / "result", []

    def work():
        calls.append(1)
        result.write_text("x")

    def again(key):
        stages = quickstart.Stages(tmp_path / "stages.json", total=1)
        stages.stage("one", "do one", key, result, work)

    again("a")
    again("a")
    assert len(calls) == 1 and "re-used" in capsys.readouterr().out
    again("b")
    result.unlink()
    again("b")
    assert len(calls) == 3


def test_a_stage_that_fails_is_not_remembered(tmp_path):
    def work():
        raise quickstart.StageFailed("no")

    stages = quickstart.Stages(tmp_path / "stages.json", total=1)
    with pytest.raises(quickstart.StageFailed):
        stages.stage("one", "do one", "a", tmp_path, work)
    assert not (tmp_path / "stages.json").exists()


def test_a_failing_command_shows_its_last_lines(tmp_path):
    words = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(quickstart.StageFailed, match=r"ended with code 3(.|\n)*the reason"):
        quickstart.run(words, tmp_path / "log", shown=re.compile("nothing"))
    assert "the reason" in (tmp_path / "log").read_text()


def test_only_wanted_lines_are_shown(tmp_path, capsys):
    words = [sys.executable, "-c", "print('noise'); print('training: 1/2\\rtraining: 2/2')"]
    quickstart.run(words, tmp_path / "log", shown=quickstart._SHOWN)
    shown = capsys.readouterr().out
    assert "training: 2/2" in shown and "noise\n" not in shown
    assert "noise" in (tmp_path / "log").read_text()


def test_compression_figures_stand_by_compressor_and_budget():
    def row(model, compressor, keep, delta):
        return {"model": model, "compressor": compressor, "keep": keep, "delta_ppl": delta}

    rows = [row("base", "none", 1.0, 0.0), row("base", "a:x=1", 0.05, 1.5), row("kv", "a:x=1", 0.05, 0.25)]
    lines = quickstart.curve_lines(rows).splitlines()
    assert lines[1].split() == ["perplexity", "lost", "by", "compression", "base", "kv"]
    assert lines[2].split() == ["a:x=1", "5%", "1.500", "0.250"] and len(lines) == 3
    assert len(lines[1]) == len(lines[2])
