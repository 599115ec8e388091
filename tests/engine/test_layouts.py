"""One training step is the same at every parallel layout: figures, gates, and the gradient of every parameter.

Everything is in float64 (Megatron takes params_dtype=float64 on the CPU), so equal means to 1e-11 of each parameter's
largest gradient. Layouts load one checkpoint, that of a single process.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import MICROBATCHES, MODELS

pytestmark = pytest.mark.multiprocess

TOLERANCE = 1e-11
ROUTED = [name for name, (kvcat, *_) in MODELS.items() if kvcat.get("policy", "router") == "router"]
FOUR_GROUPS = "four groups"  # of the first model, so that four pipeline stages have a router each

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}

LAYOUTS = {
    # name → (processes, layout)
    "loss scaled": (1, {"loss_scale": 1024}),
    "TP2": (2, {"tp": 2}),
    "TP2 sequence parallel": (2, {"tp": 2, "sp": True}),
    "PP2": (2, {"pp": 2}),
    "DP2": (2, {}),
    "DP2 distributed optimizer": (2, {"dist_opt": True}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "TP2 PP2 sequence parallel": (4, {"tp": 2, "pp": 2, "sp": True}),
    "TP2 DP2 distributed optimizer": (4, {"tp": 2, "dist_opt": True}),
    "TP2 PP2 sequence parallel, recomputed": (4, {"tp": 2, "pp": 2, "sp": True, "recompute": FULL}),
    "TP2 PP2, attention recomputed": (4, {"tp": 2, "pp": 2, "recompute": SELECTIVE}),
    "PP2 DP2 distributed optimizer": (4, {"pp": 2, "dist_opt": True}),
}
CASES = [(model, layout) for model in ROUTED for layout in LAYOUTS]
CASES += [
    ("random, tied", x) for x in ("TP2", "TP2 sequence parallel", "PP2", "DP2", "TP2 PP2 sequence parallel")
]
CASES += [("attention, untied", x) for x in ("TP2", "TP2 PP2")]
CASES += [("none, untied", x) for x in ("TP2 sequence parallel", "PP2", "DP2 distributed optimizer")]
CASES += [(FOUR_GROUPS, "PP4")]
LAYOUTS |= {"PP4": (4, {"pp": 4})}


def run_ranks(jobs, processes, folder):
    """Results of every rank, [rank][job]."""
    folder.mkdir()
    jobs_file = folder / "jobs.json"
    jobs_file.write_text(json.dumps(jobs))
    program = Path(__file__).with_name("layout_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    ranks, logs = [], [folder / f"rank-{rank}.log" for rank in range(processes)]
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(program), str(jobs_file), str(rank), str(processes)]
            with log.open("wb") as out:
                ranks.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + 240
        while any(rank.poll() is None for rank in ranks):
            # A dead rank leaves its peers waiting: end them all at once.
            if any(rank.poll() for rank in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        ends = [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(ends):
        pytest.fail(f"ranks ended with {ends}:\n" + "\n---\n".join(log.read_text()[-2500:] for log in logs))
    assert None not in ends, "ranks did not end in time"
    return [torch.load(f"{jobs_file}.{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(model, layout) → every rank's result; (model, None) → the reference's. Three starts of processes in all."""
    root = tmp_path_factory.mktemp("layouts")

    def job(model, layout, reference=False):
        folder = str(root / f"model-{[*MODELS, FOUR_GROUPS].index(model)}")
        kvcat = {"num_groups": 4} if model == FOUR_GROUPS else {}
        base = next(iter(MODELS)) if model == FOUR_GROUPS else model
        return dict(model=base, layout=layout, reference=reference, folder=folder, kvcat=kvcat)

    pairs = {1: [(model, None) for model in [*MODELS, FOUR_GROUPS]], 2: [("trap", "TP2")], 4: []}
    for model, layout in CASES:
        pairs[LAYOUTS[layout][0]].append((model, layout))
    out = {}
    for processes, cases in pairs.items():
        jobs = [
            {"model": "trap", "layout": {"tp": 2}}
            if model == "trap"
            else job(model, LAYOUTS[layout][1] if layout else {}, reference=layout is None)
            for model, layout in cases
        ]
        ranks = run_ranks(jobs, processes, root / f"processes-{processes}")
        for number, case in enumerate(cases):
            out[case] = [rank[number] for rank in ranks]
    return out


@pytest.fixture(params=CASES, ids=" / ".join)
def case(request, results):
    """(model, layout, ranks' results, the reference's result)."""
    model, layout = request.param
    return model, layout, results[request.param], results[model, None][0]


def test_same_figures(case):
    _, _, ranks, reference = case
    for rank in ranks:
        assert rank["figures"].keys() == reference["figures"].keys()
        for name, value in reference["figures"].items():
            assert rank["figures"][name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


def test_same_gates_in_every_layer(case):
    _, layout, ranks, reference = case
    seen = set()
    for rank in ranks:
        mine = range(MICROBATCHES)[rank["dp_rank"] :: rank["dp"]]
        for layer, gates in rank["gates"].items():
            seen.add(layer)
            if (
                "recompute" in LAYOUTS[layout][1]
            ):  # runs and replays of micro-batches, in the schedule's order
                places = [
                    [micro for micro in mine if torch.equal(gate, reference["gates"][layer][micro])]
                    for gate in gates
                ]
                assert sorted(sum(places, [])) == sorted([*mine, *mine]), layer
                continue
            assert len(gates) == len(mine)
            for gate, micro in zip(gates, mine, strict=True):
                expected = reference["gates"][layer][micro]
                assert (gate is None) == (expected is None)
                assert gate is None or torch.equal(gate, expected), (layer, micro)
    assert seen == {1, 2, 3, 4}


def test_same_gradient_of_every_parameter_on_every_rank(case):
    """Routers included: each rank's copy must hold the whole gradient, or the copies drift apart."""
    model, layout, ranks, _ = case
    routers = set()
    for number, rank in enumerate(ranks):
        assert rank["errors"]
        for name, (error, scale) in rank["errors"].items():
            assert scale > 1e-7, f"{name} has no gradient to compare"
            assert error <= TOLERANCE * scale, (
                f"rank {number}, {name}: off by {error / scale:.2g} of its largest"
            )
            routers |= {name} if ".router." in name else set()
    groups = 4 if model == FOUR_GROUPS else 2
    assert len({name.partition(".router.")[0] for name in routers}) >= (
        groups if model not in MODELS or model in ROUTED else 0
    )
    assert bool(routers) == (model == FOUR_GROUPS or model in ROUTED), layout


def test_same_gradient_norms(case):
    _, layout, ranks, reference = case
    scale = LAYOUTS[layout][1].get("loss_scale", 1)  # they are taken before the loss scale is divided out
    for rank in ranks:
        for name in ("backbone", "routers"):
            assert rank["norms"][name] == pytest.approx(scale * reference["norms"][name], rel=TOLERANCE)


@pytest.mark.parametrize("model", [*MODELS, FOUR_GROUPS])
def test_the_reference_is_worth_comparing_with(results, model):
    """Gates open and shut, every term there, norms those of a plain sum of squares."""
    (reference,) = results[model, None]
    figures, norms = reference["figures"], reference["norms"]
    assert (
        norms["backbone"] == pytest.approx(reference["plain_norms"][False], rel=1e-12)
        and norms["backbone"] > 0.1
    )
    assert norms["routers"] == pytest.approx(reference["plain_norms"][True], rel=1e-12)
    if model == "none, untied":
        assert "loss/distill" not in figures and "keep_rate" not in figures and norms["routers"] == 0
        return
    assert 0.2 < figures["keep_rate"] < 0.8 and figures["loss/distill"] > 0.01
    routed = model == FOUR_GROUPS or model in ROUTED
    assert (norms["routers"] > 1e-3) == routed and ("loss/budget" in figures) == routed
    if routed:
        assert all(0 < gate.mean() < 1 for gates in reference["gates"].values() for gate in gates)
        parts = ("anchor", "distill", "budget")
        weights = (1, 1, 0.1)
        total = sum(w * figures[f"loss/{part}"] for w, part in zip(weights, parts, strict=True))
        assert figures["loss/total"] == pytest.approx(total, rel=1e-12)


def test_the_trap_of_strided_gradients(results):
    """Megatron 0.15.3 loses the sum over ranks when a gradient is a strided view; our copy does not."""
    ranks = results["trap", "TP2"]
    whole = (2 * torch.arange(6.0).view(3, 2) + 10).t()
    for number, rank in enumerate(ranks):
        assert torch.equal(rank["ours"], whole)
        assert torch.equal(rank["megatron"], (torch.arange(6.0).view(3, 2) + 10 * number).t()), (
            "mended upstream?"
        )
