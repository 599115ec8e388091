"""Attention over windows that are split between processes is that of one process, gradients of every gate included."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvcat_nemo.kernels.attention.context_parallel import WindowSplit
from kvcat_nemo.kernels.fused.cpu import CpuKernel
from kvcat_nemo.kernels.fused.selection import select_backend
from tests.kernels import kernel_checks
from tests.kernels.split_ranks import CASES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("window", [None, 1, 4, 12, 99])
@pytest.mark.parametrize("shape", ["one head", "GQA"])
def test_the_cpu_kernel_of_a_split_window(shape, window):
    kernel_checks.check_split(CpuKernel(), kernel_checks.SHAPES[shape], window=window)


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """[rank][case] → distances of o, dq, dk, dv and dgate from those of one process in float64."""
    folder = tmp_path_factory.mktemp("split")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.split_ranks", str(folder), str(rank), "4"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        logs = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * 4, "\n---\n".join(logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.multiprocess
def test_every_case_ran(errors):
    plain = sum(not settings for _, _, settings in CASES.values())
    assert all(len(rank) == 2 * 5 * (len(CASES) + plain) for rank in errors)


@pytest.mark.multiprocess
@pytest.mark.parametrize("dtype,bound", [("float64", 1e-12), ("float32", 3e-6), ("bfloat16", 2e-2)])
def test_output_and_gradients_on_every_rank(errors, dtype, bound):
    for rank, cases in enumerate(errors):
        for name, distances in cases.items():
            if dtype in name:
                # A logit of 200 is rounded at 1e-5 in float32, and so is the logarithm of its gate's gradient.
                wider = 30 if dtype == "float32" and "dominant" in name else 1
                assert max(distances) <= wider * bound, (rank, name, distances)


def test_packed_documents_in_a_split_window_are_refused():
    with pytest.raises(
        ValueError, match="packed documents .* data.packed_documents=False, or context_parallel_size=1"
    ):
        select_backend("cpu", device="cpu", dtype=torch.float32, head_dim=8, packed=True, split=True)


def test_windows_that_are_no_two_chunks_a_rank_are_refused():
    with pytest.raises(
        ValueError, match="5 tokens on each of 2 context-parallel ranks .* a multiple of 4 tokens"
    ):
        WindowSplit(None, 2, 0).runs(5)
