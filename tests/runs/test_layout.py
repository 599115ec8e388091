"""The names in a run's folder stand in one module; no other file of the project spells one out."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvcat_nemo.runs import exit_codes, layout
from kvcat_nemo.runs.layout import RunFolder

ROOT = Path(__file__).parents[2]
OWNER = ROOT / "kvcat_nemo" / "runs" / "layout.py"
PYTHON = [
    p for room in ("kvcat_nemo", "conversion", "recipes", "launch") for p in (ROOT / room).rglob("*.py")
]
SHELL = [
    p for p in (ROOT / "launch").iterdir() if p.suffix in (".sh", ".sbatch") and p.name != "run_names.sh"
]
ITS_OWN = {
    layout.METRICS_FILE, layout.ORDER_FILE, layout.LOSSES_PICTURE, layout.RUN_FILE, layout.FINISHED, layout.STOPPED,
    layout.BASE, layout.MANIFEST, layout.SCORE, layout.RECORD, layout.CARD, layout.UNFINISHED, layout.BROKEN, layout.HASHES,
    "attempts.tsv",
}  # fmt: skip
"""Names that nothing else has."""
PARTS = {layout.CHECKPOINTS, layout.RECORDS, layout.WEIGHTS, layout.CONTEXT}
"""Words of other meanings too: a name when they are joined to a path."""


def spelled_out(source: str) -> list[str]:
    """Names of a run's folder that a module writes as text: as a whole, or as the last part of a path."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = getattr(node, "value", None)
        if isinstance(node, ast.Constant) and isinstance(text, str) and text.rpartition("/")[2] in ITS_OWN:
            found.append(f"line {node.lineno}: {text}")
        joined = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else None
        if isinstance(joined, ast.Constant) and joined.value in PARTS:
            found.append(f"line {node.lineno}: / {joined.value!r}")
    return found


def test_no_other_module_spells_a_name_out():
    assert len(PYTHON) > 200 and OWNER in PYTHON
    found = {str(p.relative_to(ROOT)): spelled_out(p.read_text("utf-8")) for p in PYTHON if p != OWNER}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line", ["x = 'metrics.jsonl'", "x = run / 'checkpoints'", "x = f'{r}/kvcat/finished.json'"]
)
def test_a_name_that_is_spelled_out_is_seen(line):
    assert len(spelled_out(line)) == 1


def test_no_launch_script_spells_a_name_out():
    words = ITS_OWN | {"checkpoints/", "/job.sbatch", "/attempt-", "/health/", "/exit/", "/nccl"}
    assert len(SHELL) >= 6
    for path in SHELL:
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        assert [word for word in sorted(words) if word in code] == [], path


def ask(*words):
    return subprocess.run([sys.executable, "-m", "kvcat_nemo.runs", *words], capture_output=True, text=True)


def test_the_launch_scripts_names_are_those_of_the_module():
    made = ask("--shell-names")
    kept = (ROOT / "launch" / "run_names.sh").read_text()
    assert made.returncode == 0 and made.stdout == kept == layout.shell_names()
    code = 'source launch/run_names.sh; echo "$RUN_FINISHED $RUN_ATTEMPTS $RUN_MANIFEST $KVCAT_EXIT_AGAIN"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=ROOT)
    said = f"kvcat/finished.json launch/attempts.tsv kvcat_seal.json {exit_codes.REQUEUE}"
    assert done.stdout.split() == said.split()
    assert ask().returncode != 0 and "--shell-names" in ask().stderr


def test_every_shell_variable_is_used():
    code = "".join(path.read_text() for path in SHELL)
    names = re.findall(r"readonly (\w+)=", layout.shell_names())
    assert len(names) > 12 and [name for name in names if name not in code] == []


def test_paths(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.metrics == tmp_path / "run" / "kvcat" / "metrics.jsonl"
    assert RunFolder.of_checkpoint(run.checkpoints / "step=4").config == run.config


@pytest.mark.parametrize(
    ("text", "step"),
    [('{"step": 7}', 7), ("", None), ("{", None), ("[7]", None), ('{"step": "7"}', None), ('{"at": 7}', None), (None, None)],
)  # fmt: skip
def test_finished_at(text, step, tmp_path):
    run = RunFolder(tmp_path)
    run.records.mkdir()
    if text is not None:
        run.finished.write_text(text)
    assert run.finished_at() == step


def test_a_runs_folder_of_today_keeps_its_names():
    """Older runs open, and older versions read what this one writes: the names on disk do not change."""
    kept = {name: value for name, value in vars(layout).items() if name.isupper() and isinstance(value, str)}
    assert json.dumps(sorted(kept.values())) == json.dumps(
        sorted([
            "-broken", "-unfinished", ".hashes-", "checkpoints", "config.json", "config.yaml", "context", "data_order.json",
            "finished.json", "hf", "kvcat", "kvcat_base.json", "kvcat_checkpoint.json", "kvcat_model.json", "kvcat_score.json",
            "kvcat_seal.json", "last", "launch", "losses.png", "manifest.json", "metrics.jsonl", "mlflow_run.json",
            "stopped.json", "weights",
        ])
    )  # fmt: skip
