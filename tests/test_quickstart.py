"""The quickstart's script and the report, without the hours: steps, failing commands, figures, picture."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from kvcat_nemo.cli import main
from kvcat_nemo.tracking import run_report

_spec = importlib.util.spec_from_file_location(
    "quickstart", Path(__file__).parents[1] / "examples" / "quickstart.py"
)
quickstart = sys.modules["quickstart"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(quickstart)


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


def python(code):
    return shlex.join([sys.executable, "-c", code])


def step(name, result, code="", **options):
    """A step whose command writes its result and adds a line to `calls`."""
    work = f"open('calls', 'a').write('{name}\\n'); import pathlib; pathlib.Path('{result}').write_text('x'); {code}"
    return quickstart.Step(name, f"do {name}", result, (python(work),), **options)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda: Path("calls").read_text().split() if Path("calls").exists() else []


def test_a_step_is_run_once_and_again_with_all_after_it_when_it_changes(calls, capsys):
    def plan(code=""):
        return [step("a", "a.out"), step("b", "b.out", code, reads=("settings",)), step("c", "c.out")]

    done = quickstart.carry_out(plan(), Path("results"))
    assert calls() == ["a", "b", "c"] and all(entry["seconds"] > 0 for entry in done.values())
    quickstart.carry_out(plan(), Path("results"))
    assert calls() == ["a", "b", "c"] and capsys.readouterr().out.count("re-used") == 3
    quickstart.carry_out(plan("1 + 1"), Path("results"))
    assert calls()[3:] == ["b", "c"]  # another command: it and what follows
    Path("settings").write_text("1")
    quickstart.carry_out(plan("1 + 1"), Path("results"))
    assert calls()[5:] == ["b", "c"]  # what it reads has changed
    Path("c.out").unlink()
    quickstart.carry_out(plan("1 + 1"), Path("results"))
    assert calls()[7:] == ["c"]  # its result is gone


def test_a_step_that_fails_stops_with_its_last_lines_and_is_run_again(calls):
    broken = [step("a", "a.out"), step("b", "b.out", "print('the reason'); raise SystemExit(3)")]
    with pytest.raises(SystemExit, match=r"(?s)ended with code 3; its last lines .*b.log.*the reason"):
        quickstart.carry_out(broken, Path("results"))
    assert "the reason" in Path("results/logs/b.log").read_text()
    quickstart.carry_out([broken[0], step("b", "b.out")], Path("results"))
    assert calls() == ["a", "b", "b"]
    with pytest.raises(SystemExit, match="step c left no c.out"):
        quickstart.carry_out([quickstart.Step("c", "do c", "c.out", (python("1"),))], Path("results"))


def test_a_finished_run_of_other_settings_is_moved_aside_and_an_unfinished_one_is_gone_on_with(calls):
    def train(code, finish=True):
        Path("run").mkdir(exist_ok=True)
        work = f"import pathlib; pathlib.Path('run/log').open('a').write('{code}')"
        work += "; pathlib.Path('run/finished').touch()" if finish else "; raise SystemExit(1)"
        work = f"import pathlib; pathlib.Path('run').mkdir(exist_ok=True); {work}"
        plan = [quickstart.Step("train", "train", "run/finished", (python(work),), fresh=("run", "absent"))]
        quickstart.carry_out(plan, Path("results"))

    with pytest.raises(SystemExit):
        train("1", finish=False)
    train("2")
    assert Path("run/log").read_text() == "12"
    train("3")
    assert Path("run/log").read_text() == "3" and len(list(Path().glob("run-*/log"))) == 1


def test_only_wanted_lines_are_shown(tmp_path, capsys):
    words = python("print('noise'); print('training: 1/2\\rtraining: 2/2')")
    quickstart.run(words, tmp_path / "log", shown=quickstart.SHOWN)
    shown = capsys.readouterr().out
    assert "training: 2/2" in shown and "  noise" not in shown
    assert "noise" in (tmp_path / "log").read_text()


def commands():
    return [shlex.split(command) for step in quickstart.PLAN for command in step.commands]


@pytest.mark.parametrize("words", [w for w in commands() if w[0] == "kvcat"], ids=" ".join)
def test_its_commands_parse(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in words:  # folders that must exist
        if "/" in word and "." not in Path(word).name:
            Path(word).mkdir(parents=True, exist_ok=True)
    command, rest = main, words[1:]
    while isinstance(command, click.Group):
        _, command, rest = command.resolve_command(click.Context(command), rest)
    command.make_context(command.name, list(rest))


@pytest.mark.nemo
def test_its_training_names_a_recipe_and_fields():
    import ast

    from kvcat_nemo.recipes import RECIPES
    from kvcat_nemo.recipes.overrides import check_overrides

    (words,) = (w for w in commands() if w[0] == "nemo")
    call = ast.parse(words[words.index("--factory") + 1], mode="eval").body
    recipe = RECIPES[call.func.id](**{k.arg: ast.literal_eval(k.value) for k in call.keywords})
    check_overrides(recipe, words)


def test_compression_figures_stand_by_compressor_and_budget():
    def row(model, compressor, keep, delta):
        return {"model": model, "compressor": compressor, "keep": keep, "delta_ppl": delta}

    rows = [row("base", "none", 1.0, 0.0), row("base", "a:x=1", 0.05, 1.5), row("kv", "a:x=1", 0.05, 0.25)]
    lines = quickstart.curve_lines(rows).splitlines()
    assert lines[1].split() == ["perplexity", "lost", "by", "compression", "base", "kv"]
    assert lines[2].split() == ["a:x=1", "5%", "1.500", "0.250"] and len(lines) == 3
    assert len(lines[1]) == len(lines[2])
