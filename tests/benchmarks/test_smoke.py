"""Every benchmark runs in its smallest form, and writes no committed file; what make starts is there."""

import ast
import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import smoke

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"

ELSEWHERE = {"study": "tests/benchmarks/test_study.py", "faults": "tests/nemo/test_faults.py"}
"""They start NeMo or train for minutes: their smoke form runs in the tests that do so anyway."""
HELPERS = {
    "__init__",
    "golden_losses",
    "paired_timing",
    "smoke",
    "authors_standin",
    "parallel_page",
    "roofline_counts",
    "roofline_page",
    "settings_page",
}


def committed():
    files = [*FOLDER.rglob("*.json"), *FOLDER.rglob("*.md"), *(ROOT / "docs").rglob("*")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Script → what came of its smoke form, all from one process; and whether a committed file changed."""
    before, file = committed(), tmp_path_factory.mktemp("smoke") / "smoke.json"
    command = [sys.executable, "-m", "benchmarks.smoke", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert file.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.read_text()), [
        str(p) for p, digest in committed().items() if before.get(p) != digest
    ]


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", smoke.SCRIPTS)
def test_runs(outcome, name):
    found, changed = outcome
    assert found[name]["code"] == 0, found[name]["output"]
    assert found[name]["output"].strip() and not changed


def test_every_benchmark_has_a_smoke_form_that_a_test_runs():
    scripts = {path.stem for path in FOLDER.glob("*.py")} - HELPERS
    assert scripts == set(smoke.SCRIPTS)
    packages = {path.parent.name for path in FOLDER.glob("*/__main__.py")}
    assert packages == set(ELSEWHERE)
    for name in packages:
        assert "--smoke" in (ROOT / ELSEWHERE[name]).read_text()


def commands_of(target):
    """What a target of the Makefile starts in python, as words."""
    text = (ROOT / "Makefile").read_text()
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n?)+)", text, re.M)
    assert rule, f"no target {target}"
    lines = [line.strip().lstrip("@") for line in rule[1].splitlines()]
    return [shlex.split(re.sub(r"\$\([A-Z_]+\)", "", line)) for line in lines if "python " in line]


@pytest.mark.parametrize("target", ["bench", "matrix", "faults", "study"])
def test_make_starts_what_is_there(target):
    """Scripts and modules exist, and take the options that they are given."""
    commands = commands_of(target)
    assert commands
    for _, *words in commands:
        assert words[0] == "-m", words
        module, options = ROOT / words[1].replace(".", "/"), words[2:]
        source = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
        assert source.is_file(), source
        names = {
            node.args[0].value
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
        }
        assert set(options) <= names, options
        parsed = source.stem if source.stem != "__main__" else source.parent.name
        assert parsed in smoke.SCRIPTS or parsed in ELSEWHERE


def test_the_page_names_every_command_of_bench():
    """docs/LOG.md and the scripts say `make bench` makes their figures: attention, losses, step and roofline."""
    assert [words[2].removeprefix("benchmarks.") for words in commands_of("bench")] == [
        "attention",
        "loss",
        "step",
        "roofline",
    ]


def test_shrink_never_leaves_a_committed_path(tmp_path):
    import argparse

    parser = argparse.ArgumentParser()
    smoke.add_option(parser)
    parser.add_argument("--out", type=Path, default=FOLDER / "step.json")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "img" / "step.png")
    args = smoke.shrink(parser.parse_args(["--smoke"]), parser, rounds=1)
    assert args.rounds == 1 and ROOT not in args.out.parents and ROOT not in args.plot.parents
    given = smoke.shrink(parser.parse_args(["--smoke", "--out", str(tmp_path / "x")]), parser)
    assert given.out == tmp_path / "x"
    usual = smoke.shrink(parser.parse_args([]), parser, rounds=1)
    assert usual.out == FOLDER / "step.json" and not hasattr(usual, "rounds")
