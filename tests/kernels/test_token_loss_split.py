"""The losses over a vocabulary split between processes are those of one process: TP2 and TP4, sequence-parallel too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """[rank][case] → distances of metrics and both gradients from those of one process in float64."""
    folder = tmp_path_factory.mktemp("split")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.token_loss_ranks", str(folder), str(rank), "4"],
            cwd=Path(__file__).parents[2],
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


def test_every_case_ran(errors):
    assert all(len(rank) == 80 for rank in errors)


@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-12), ("float32", 2e-6)])
def test_metrics_and_gradients_on_every_rank(errors, dtype, tolerance):
    for rank, cases in enumerate(errors):
        for name, distances in cases.items():
            if dtype in name:
                assert max(distances) < tolerance, (rank, name, distances)
