"""What surrounds the fused call of gated attention: how many launches it takes, and when the host waits for the device."""

import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from kvcat_nemo.kernels import gated_attention
from kvcat_nemo.kernels.attention.overflow import HEADROOM, QUIET, QUIET_STEPS, OverflowWatch, watch
from kvcat_nemo.kernels.fused.flash import longest
from kvcat_nemo.kernels.losses.token_loss import token_losses
from tests.kernels.launches import Launches, attention_launches
from tests.kernels.test_gated import case

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = ROOT / ".venv-te" / "bin" / "python"
FEWEST = 53
"""Fewer cases than this, and something was not collected."""


def test_the_triton_form_by_its_interpreter(tmp_path):
    assert PYTHON.exists(), f"{PYTHON.relative_to(ROOT)} is missing: run `make setup`"
    report = tmp_path / "report.xml"
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [*command, HERE / "columns_cases.py"],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= FEWEST, suite.attrib
    assert suite.get("skipped") == suite.get("failures") == suite.get("errors") == "0", suite.attrib


@pytest.mark.parametrize(
    "options,forward,backward",
    [({}, 49, 108), ({"recent_window": 3}, 45, 91), ({"cu_seqlens": torch.tensor([0, 4, 11])}, 56, 113)],
    ids=["own slot", "window", "packed"],
)
def test_operations_of_the_plain_form(options, forward, backward):
    """In bf16, without the fused kernels' own. A change that needs more is a change to think about: raise the numbers knowingly."""
    counted = attention_launches(**options)
    assert (len(counted.forward) <= forward) and (len(counted.backward) <= backward), (
        len(counted.forward),
        len(counted.backward),
    )


@pytest.fixture
def quiet(monkeypatch):
    """As on a GPU after some steps with small weights."""
    monkeypatch.setattr(watch, "quiet_steps", QUIET_STEPS)
    # Tensors on the CPU are asked always: they cost no wait.
    monkeypatch.setattr(OverflowWatch, "exceeded", as_on_a_gpu)


def as_on_a_gpu(self, weights, split=None):
    largest = weights.amax().float().nan_to_num(nan=torch.inf, posinf=torch.inf)
    above = self._note(largest if split is None else split.maximum(largest))
    return bool(above) if self.asks else False


@pytest.mark.parametrize("options", [{}, {"cu_seqlens": torch.tensor([0, 4, 11])}], ids=["plain", "packed"])
def test_a_quiet_run_waits_for_nothing(quiet, options):
    counted = attention_launches(**options)
    assert not counted.forward.syncs and not counted.backward.syncs
    watch.quiet_steps = 0
    assert attention_launches(**options).backward.syncs == ["aten._local_scalar_dense.default"]


def test_the_watch_looks_once_per_step_after_quiet_steps():
    seen = OverflowWatch()
    small, large = torch.tensor([1.0, 1e3]), torch.tensor([1.0, 2.0**120])
    assert torch.tensor(QUIET).exp() > 1e3 and torch.tensor(HEADROOM).exp() < 2.0**120
    for _ in range(QUIET_STEPS):
        assert seen.asks and not seen.exceeded(small)
        assert seen.end_of_step() == 0
    assert not seen.asks
    assert seen.end_of_step() == 0 and not seen.asks  # a validation changes nothing
    seen.exceeded(large)
    seen.exceeded(torch.tensor([float("nan")]))
    assert seen.end_of_step() == 2 and seen.asks
    assert seen.exceeded(large) and seen.end_of_step() == 1


def test_the_longest_document_is_asked_for_once():
    boundaries = torch.tensor([0, 5, 12, 20], dtype=torch.int32)
    with Launches() as first:
        assert longest(boundaries) == 8
    with Launches() as again:
        assert longest(boundaries) == longest(boundaries.detach()) == 8
    assert first.syncs and not again.syncs
    boundaries[2] = 6
    assert longest(boundaries) == 14


def test_the_losses_wait_once_in_backward():
    hidden = torch.randn(4, 2, 6, requires_grad=True)
    weight, labels, weights = torch.randn(9, 6), torch.zeros(1, 4, dtype=torch.long), torch.rand(2, 1, 4)
    loss = (token_losses(hidden, weight, labels, loss_weights=weights)[:2] * weights).sum()
    with Launches() as counted:
        loss.backward()
    # One answer of four numbers; a CPU counts each of its numbers.
    assert len(counted.syncs) <= 4


def test_gate_overflow_is_counted():
    watch.end_of_step()
    *tensors, do = case(1, 40, 2, 1, 8, spread=8.0, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in tensors]
    (gated_attention(*leaves, scale=1.0) * do).sum().backward()
    assert watch.end_of_step() == 1
