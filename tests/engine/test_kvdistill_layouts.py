"""KV-Distill trains as one process at every layout: figures, and the gradient of every adapter and of the scorer."""

import pytest

from tests.engine import matrix_run

pytestmark = pytest.mark.multiprocess
PROGRAM = "tests.engine.kvdistill_ranks"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
RECIPES = {"paper": {}, "ablation": {"routing": False, "dropped_slot_gradient": True}}
ENOUGH = {
    "keep_min": 0.5,
    "keep_max": 0.9,
}  # the query of a context's first token asks nothing: others must be chosen too
CASES = {
    "TP2": ("paper", {"tp": 2}, {}),
    "TP2 SP": ("paper", {"tp": 2, "sp": True}, {}),
    "PP2": ("paper", {"pp": 2}, {}),
    "DP2": ("paper", {"dp": 2}, {}),
    "TP2 PP2": ("paper", {"tp": 2, "pp": 2}, {}),
    "TP2 PP2 SP, recomputed": ("paper", {"tp": 2, "pp": 2, "sp": True}, FULL),
    "TP2 SP, ablation": ("ablation", {"tp": 2, "sp": True}, {}),
    "PP2, ablation": ("ablation", {"pp": 2}, {}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Case → every rank's result; recipe → that of one process. Three starts of processes for all of them."""
    root = tmp_path_factory.mktemp("kvdistill")
    before, matrix_run.PROGRAM = matrix_run.PROGRAM, PROGRAM

    def job(recipe, layout, fields, reference=False):
        distill = RECIPES[recipe] | ENOUGH
        folder = str(root / recipe)
        return {
            "layout": layout,
            "distill": distill,
            "fields": fields,
            "folder": folder,
            "reference": reference,
        }

    try:
        alone = matrix_run.run_ranks([job(recipe, {}, {}, True) for recipe in RECIPES], 1, root / "alone")
        out = {recipe: ranks[0] for recipe, ranks in zip(RECIPES, alone, strict=True)}
        for processes in (2, 4):
            names = [
                n
                for n, (_, layout, _) in CASES.items()
                if 2 ** sum(layout.get(p, 1) == 2 for p in ("tp", "pp", "dp")) == processes
            ]
            found = matrix_run.run_ranks(
                [job(*CASES[name]) for name in names], processes, root / f"ranks-{processes}"
            )
            out |= dict(zip(names, found, strict=True))
    finally:
        matrix_run.PROGRAM = before
    return out


@pytest.mark.parametrize("name", CASES)
def test_trains_as_one_process(results, name):
    figures = results[CASES[name][0]]["figures"]
    assert len(results[name]) in (2, 4)
    for result in results[name]:
        for key, value in figures.items():
            assert result["figures"][key] == pytest.approx(value, rel=1e-10, abs=1e-12), key
        assert result["errors"]
        for parameter, (error, scale) in result["errors"].items():
            assert scale > 1e-7, parameter
            assert error <= 1e-10 * scale, (parameter, error / scale)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_is_worth_comparing_with(results, recipe):
    figures = results[recipe]["figures"]
    assert 0.4 < figures["keep_rate"] < 0.95 and figures["loss/distill"] > 0.01
    assert figures["loss/total"] == figures["loss/distill"]
