"""The Triton form of the losses passes the cases of the plain form: Triton's interpreter runs its kernels on the CPU."""

import json
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from kvcat_nemo.kernels.losses.token_loss import select_loss_kernel

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = ROOT / ".venv-te" / "bin" / "python"
"""Has Triton beside .venv's packages."""
FEWEST = 25
"""Fewer cases than this, and something was not collected."""


def environment() -> dict[str, str]:
    assert PYTHON.exists(), f"{PYTHON.relative_to(ROOT)} is missing: run `make setup`"
    return os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "EXAMPLES": "8",
        "PYTHONPATH": str(ROOT),
    }


def test_the_cases_of_the_plain_form(tmp_path):
    """Values and gradients in float64 (1e-12), float32 and bf16 against the method's own functions."""
    report = tmp_path / "report.xml"
    command = [
        PYTHON,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "tests.kernels.triton_plugin",
        "--durations=6",
    ]
    done = subprocess.run(
        [*command, f"--junitxml={report}", HERE / "test_token_loss.py"],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= FEWEST, suite.attrib
    assert suite.get("skipped") == suite.get("failures") == suite.get("errors") == "0", suite.attrib


@pytest.mark.multiprocess
@pytest.mark.parametrize("kernel,count", [("triton", 20), ("unequal", 4)])
def test_a_split_vocabulary(tmp_path, kernel, count):
    """Of "unequal" processes one cannot use Triton: all that share a vocabulary take the other form."""
    ranks = [
        subprocess.Popen(
            [PYTHON, "-m", "tests.kernels.token_loss_ranks", tmp_path, str(rank), "4", kernel],
            cwd=ROOT,
            env=environment() | {"PYTHONWARNINGS": "ignore"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        logs = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n---\n".join(logs)
    for rank in range(4):
        cases = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(cases) == count
        for name, distances in cases.items():
            assert max(distances) < 1e-12, (rank, name, distances)


def test_the_small_cases_that_a_run_tries_first():
    program = HERE / "loss_small_cases.py"
    done = subprocess.run([PYTHON, program], capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("as it is") == ""
    assert found.pop("cannot be compiled in bf16") == "RuntimeError: no such type"
    for name, text in found.items():
        assert "differs from the plain form" in text, (name, text)
    assert found["bf16 gradients 2 % too large"].startswith("torch.bfloat16, dense")
    assert len(found) == 4


def test_the_choice_of_a_kernel():
    cpu = torch.device("cpu")
    assert select_loss_kernel("auto", cpu) == select_loss_kernel("torch", cpu) == "torch"
    with pytest.raises(ValueError, match="loss_kernel='cuda': choose one of auto, torch, triton"):
        select_loss_kernel("cuda", cpu)
    with pytest.raises(ValueError, match="loss_kernel=triton cannot be used on cpu"):
        select_loss_kernel("triton", cpu)
