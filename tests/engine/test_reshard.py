"""A checkpoint of the distributed optimizer goes on in another layout: the form that recipes save in on GPU hosts.

Real gloo processes; Megatron's Adam is PyTorch's here, which engine.optimizer_state lets resume.
"""

import pytest
import torch

from kvcat_nemo.doctor.compare import checkpoint_differences, figures_differ
from kvcat_nemo.doctor.ranks import run_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

SMALL = {"hidden": 64, "head_dim": 16, "tokens": 32, "micro": 4, "dtype": "bf16", "lr": 1e-3}
BUCKETS = {"bucket": 20_000}  # several buckets, whose boundaries lie elsewhere than those of one

# name → layout and options of the run that goes on; all begin with what one process saved
LAYOUTS = {
    "TP2 SP": {"tp": 2},
    "PP2": {"pp": 2},
    "CP2": {"cp": 2},
    "DP2, other buckets": BUCKETS,
    "DP2, one writer": {"memory_efficient": True},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One process: three steps, a checkpoint, two more steps from it; and the same begun again from the checkpoint."""
    folder = tmp_path_factory.mktemp("reshard")
    start = {"start": str(folder / "start"), "make_start": True, "steps": 3, "save": str(folder / "saved")}
    again = {"load": str(folder / "saved"), "first_step": 3, "steps": 2, "save_again": str(folder / "again")}
    straight = {"start": str(folder / "start"), "steps": 5}
    results = run_ranks([SMALL | job for job in (start, again, straight)], 1, "cpu", folder / "one")
    return folder, [result[0]["figures"] for result in results]


def test_a_resumed_run_is_the_unbroken_one_to_the_last_bit(trained):
    folder, (_, again, straight) = trained
    fresh = ("flipped", "flipped/group0", "flipped/group1")  # of the previous step's window

    def known(lines):
        return [{name: value for name, value in line.items() if name not in fresh} for line in lines]

    assert known(again) == known(straight[3:])
    assert checkpoint_differences(folder / "saved", folder / "again") == []


@pytest.fixture(scope="module")
def resumed(trained):
    """Every layout goes on from the one process' checkpoint, and first writes down what it read."""
    folder, _ = trained
    jobs = [
        SMALL | options | {"load": str(folder / "saved"), "first_step": 3, "steps": 2, "save_again": str(folder / name)}
        for name, options in LAYOUTS.items()
    ]  # fmt: skip
    return dict(zip(LAYOUTS, run_ranks(jobs, 2, "cpu", folder / "two"), strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_process_goes_on_in_that_layout(trained, resumed, name):
    folder, (_, again, _) = trained
    assert checkpoint_differences(folder / "saved", folder / name) == []
    assert figures_differ(resumed[name][0]["figures"], again) == []


def test_from_two_and_four_ranks(trained, resumed):
    """DP2 → DP4, TP2 → DP4, PP2 → TP2 DP2, many buckets → one: what was written in two processes goes on in four."""
    folder, (_, again, _) = trained
    froms = {"DP2, other buckets": {}, "TP2 SP": BUCKETS, "PP2": {"tp": 2}, "DP2, one writer": {"pp": 2}}
    jobs = [
        SMALL | options | {"load": str(folder / name), "first_step": 3, "steps": 2, "save_again": f"{folder / name}-4"}
        for name, options in froms.items()
    ]  # fmt: skip
    for name, result in zip(froms, run_ranks(jobs, 4, "cpu", folder / "four"), strict=True):
        assert checkpoint_differences(folder / "saved", f"{folder / name}-4") == [], name
        assert figures_differ(result[0]["figures"], again) == [], name


def test_a_changed_moment_is_seen(trained):
    """The comparison itself: one element of one moment."""
    from kvcat_nemo.doctor.compare import _stored

    folder, _ = trained
    name, tensor = next((n, t) for n, t in _stored(folder / "saved").items() if "exp_avg_sq" in n)
    assert tensor.numel() > 1 and torch.isfinite(tensor).all(), name
    changed = tensor.clone()
    changed.view(-1)[1] += 1e-9
    assert not torch.equal(changed, tensor)
