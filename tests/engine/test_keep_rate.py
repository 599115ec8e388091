"""On real text the keep rate starts at 1, leaves it and settles at its target (benchmarks/keep_rate.py at small)."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import keep_rate as bench

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/keep_rate.py"


@pytest.mark.slow
def test_keep_rate_leaves_one_and_settles_at_the_target(one_process):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    args = bench.arguments(["--tokens", "64", "--windows", "16"])
    text = bench.real_text(300_000)
    base, _ = bench.train("base", {"policy": "none"}, text, args, 60, 3e-3)
    weights = {key: value for key, value in base.state_dict().items() if value is not None}
    _, run = bench.train("knob", bench.SETTINGS["budget3-cap0-detach"], text, args, 120, 1e-3, weights)
    torch.set_num_threads(threads)
    assert run.keep_rate_by_router[0] == [1.0, 1.0] and run.probability[0] > 0.999
    assert min(run.keep_rate) < 0.9
    assert abs(bench.settled(run) - args.target) <= bench.TOLERANCE
    assert run.dense_loss[-1] < run.dense_loss[0] + 0.1


def test_committed_results_are_of_this_script_and_show_a_knob_that_works():
    report = json.loads(SCRIPT.with_name("keep_rate.json").read_text())
    runs = {run["name"]: run for run in report["runs"]}
    assert set(runs) <= set(bench.SETTINGS) and {"none", "as the paper", "budget3-cap0-detach"} <= set(runs)
    for name, run in runs.items():
        assert {k: run["kvcat"][k] for k in bench.SETTINGS[name]} == bench.SETTINGS[name]
        steps = report["manifest"]["arguments"]["steps"]
        assert len(run["keep_rate"]) == len(run["dense_loss"]) == len(run["masked_loss"]) == steps
        if run["kvcat"]["policy"] == "router" and run["kvcat"]["router_init_keep"] == 1:
            assert run["keep_rate"][0] == 1.0
    assert abs(runs["budget3-cap0-detach"]["summary"]["keep_rate"] - 0.5) <= bench.TOLERANCE
    assert {"git_revision", "versions", "seconds", "arguments"} <= report["manifest"].keys()
