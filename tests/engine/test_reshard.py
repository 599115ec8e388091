"""A checkpoint of the distributed optimizer goes on in another layout: the form that recipes save in on GPU hosts.

Real gloo processes on plain Megatron-core. Its Adam is PyTorch's here, which engine.compat.distributed_optimizer lets resume. Weights,
master weights and moments are compared to the last bit: what a layout reads it writes down again before it goes on.
"""

import pytest
import torch

from kvcat_nemo.doctor.compare import checkpoint_differences, figures_differ, stored
from kvcat_nemo.doctor.ranks import run_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

SMALL = {"layers": 2, "hidden": 64, "head_dim": 16, "tokens": 32, "micro": 4, "dtype": "bf16", "lr": 1e-3}
# Several buckets. The embedding has 503·64 elements, no multiple of what buckets are padded to.
BUCKETS = {"bucket": 20_000}

# From one process: name → layout and options of two that go on.
TWO = {
    "TP2 SP": {"tp": 2},
    "PP2": {"pp": 2},
    "DP2, other buckets": BUCKETS,
    "DP2, gathered by one rank": {"memory_efficient": True},
    "DP2, averaged in the collective": {"average": True},
}
# From two processes: (what they saved, layout of four that go on).
FOUR = {
    "DP2, other buckets → DP4": ("DP2, other buckets", {}),
    "TP2 → PP2 DP2, other buckets": ("TP2 SP", {"pp": 2} | BUCKETS),
}


def goes_on(folder, saved: str, name: str, options: dict, steps: int = 1) -> dict:
    return (
        SMALL
        | options
        | {"load": str(folder / saved), "first_step": 3, "steps": steps, "save_again": str(folder / name)}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One process: three steps and a checkpoint; two steps from it; and five steps unbroken."""
    folder = tmp_path_factory.mktemp("reshard")
    start = {"start": str(folder / "start"), "make_start": True, "steps": 3, "save": str(folder / "saved")}
    straight = {"start": str(folder / "start"), "steps": 5}
    jobs = [SMALL | start, goes_on(folder, "saved", "again", {}, steps=2), SMALL | straight]
    results = run_ranks(jobs, 1, "cpu", folder / "one")
    return folder, [result[0]["figures"] for result in results]


@pytest.fixture(scope="module")
def two(trained):
    folder, _ = trained
    jobs = [goes_on(folder, "saved", name, options) for name, options in TWO.items()]
    return dict(zip(TWO, run_ranks(jobs, 2, "cpu", folder / "two"), strict=True))


def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(trained):
    folder, (_, again, straight) = trained
    fresh = ("flipped", "flipped/group0", "flipped/group1")  # of the previous step's window

    def known(lines):
        return [{name: value for name, value in line.items() if name not in fresh} for line in lines]

    assert known(again) == known(straight[3:])
    assert checkpoint_differences(folder / "saved", folder / "again") == []


@pytest.mark.parametrize("name", TWO)
def test_two_processes_go_on_from_one(trained, two, name):
    folder, (_, again, _) = trained
    assert checkpoint_differences(folder / "saved", folder / name) == []
    assert figures_differ(two[name][0]["figures"], again[:1]) == []


def test_four_processes_go_on_from_two(trained, two):
    folder, (_, again, _) = trained
    jobs = [goes_on(folder, saved, name, options) for name, (saved, options) in FOUR.items()]
    for name, result in zip(FOUR, run_ranks(jobs, 4, "cpu", folder / "four"), strict=True):
        assert checkpoint_differences(folder / "saved", folder / name) == [], name
        assert figures_differ(result[0]["figures"], again[:1]) == [], name


def test_the_comparison_sees_one_bit(trained, monkeypatch):
    folder, _ = trained
    changed = stored(folder / "saved")
    name = next(n for n in changed if "exp_avg_sq" in n)
    changed[name].view(-1)[1] = torch.nextafter(changed[name].view(-1)[1], torch.tensor(1.0))
    answers = iter([changed, stored(folder / "saved")])
    monkeypatch.setattr("kvcat_nemo.doctor.compare.stored", lambda folder: next(answers))
    assert checkpoint_differences("one", "other") == [f"{name} differs"]
