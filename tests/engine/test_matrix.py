"""Training is the same at every parallel layout: figures, masks, and the gradient of every parameter.

A short form of the parallel matrix (matrix_cases); `make matrix` runs the whole (benchmarks/parallel_matrix.py).
"""

import pytest
import torch

from tests.engine.matrix_cases import ATTENTION, BEHIND, CASES, NONE, RANDOM, ROUTED, ROUTED_UNTIED, case
from tests.engine.matrix_run import difference, run_cases, run_ranks
from tests.engine.small_models import build, enliven, microbatches, train_step, transformer_config

pytestmark = pytest.mark.multiprocess

SHORT = [c for c in CASES if c.short]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Case name → ranks' results and the reference's. Three starts of processes for all of them."""
    return run_cases(SHORT, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("c", SHORT, ids=lambda c: c.name)
def test_trains_as_one_process(c, results):
    found = difference(c, *results[c.name])
    assert not found.over(c.tolerance), "\n".join(found.over(c.tolerance))
    assert found.gradients and found.figures
    assert (found.masks > 0) == (c.recipe["model"] != NONE)


@pytest.mark.parametrize("model", [ROUTED, ROUTED_UNTIED, RANDOM, ATTENTION, NONE])
def test_the_reference_is_worth_comparing_with(results, model):
    """Gates open and shut, every term there, norms those of a plain sum of squares."""
    case = next(c for c in SHORT if c.recipe == {"model": model})
    reference = results[case.name][1]
    (figures,), norms = reference["figures"], reference["norms"]
    assert norms["backbone"] == pytest.approx(reference["plain_norms"][False], rel=1e-12)
    assert norms["routers"] == pytest.approx(reference["plain_norms"][True], rel=1e-12)
    assert norms["backbone"] > 0.1
    if model == NONE:
        assert "loss/distill" not in figures and "keep_rate" not in figures and norms["routers"] == 0
        return
    assert 0.2 < figures["keep_rate"] < 0.8 and figures["loss/distill"] > 0.01
    masks = [mask for entries in reference["masks"].values() for mask, _ in entries]
    assert len(masks) == 4 * 4 and all(0 < mask.mean() < 1 for mask in masks)
    assert all(set(mask.flatten().tolist()) == {0.0, 1.0} for mask in masks)
    routed = model in (ROUTED, ROUTED_UNTIED)
    assert (norms["routers"] > 1e-3) == routed and ("loss/budget" in figures) == routed
    if routed:
        weights = {"anchor": 1, "distill": 1, "budget": 0.1}
        total = sum(weight * figures[f"loss/{part}"] for part, weight in weights.items())
        assert figures["loss/total"] == pytest.approx(total, rel=1e-12)


def test_the_reference_behind_a_cut_is_worth_comparing_with(results):
    """Cuts at other places in other windows, slots shut and open before them."""
    case = next(c for c in SHORT if c.recipe == {"model": BEHIND})
    reference = results[case.name][1]
    (figures,) = reference["figures"]
    assert (
        0.1 < figures["keep_rate"] < 0.9 and 0.2 < figures["behind"] < 0.8 and figures["loss/distill"] > 0.01
    )
    assert "loss/budget" not in figures and reference["norms"]["backbone"] > 0.1
    cuts, prefixes = set(), []
    for entries in reference["masks"].values():
        for mask, _ in entries:
            start, gate = (mask[..., 0] / 2).floor(), mask[..., 0] % 2  # small_models.coded
            for row, gates in zip(start.tolist(), gate, strict=True):
                cut = int(row[-1])
                assert row == [0.0] * cut + [float(cut)] * (len(row) - cut) and 0 < cut < len(row)
                cuts.add(cut)
                prefixes.append(gates[:cut])
    assert len(cuts) > 3 and 0.1 < torch.cat(prefixes).mean() < 0.9


def test_training_moves(results):
    """In cases with optimizer steps the loss falls and masks change: what is compared is not one step over and over."""
    for c in SHORT:
        if c.recipe.get("updates"):
            reference = results[c.name][1]
            losses = [figures["loss/total"] for figures in reference["figures"]]
            assert len(losses) == c.recipe["updates"] + 1 and losses[-1] < losses[0] - 0.05, c.name
            rates = {figures["keep_rate"] for figures in reference["figures"]}
            assert len(rates) > 3, c.name


def test_a_wrong_gradient_mask_or_figure_is_seen(results):
    """The comparison itself: each kind of difference is found where it is put."""
    c = next(c for c in SHORT if c.name == "TP2")
    ranks, reference = results[c.name]
    assert not difference(c, ranks, reference).over(c.tolerance)
    name = next(name for name in ranks[1]["errors"] if ".router." in name)
    error, scale = ranks[1]["errors"][name]
    mask, flag = ranks[1]["masks"][3][2]
    changes = {
        f"gradient {name}": ("errors", {**ranks[1]["errors"], name: (error + 1e-9 * scale, scale)}),
        "layer 3: 1 of 4 masks": ("masks", {**ranks[1]["masks"], 3: [
            *ranks[1]["masks"][3][:2], (1 - mask, flag), *ranks[1]["masks"][3][3:]]}),
        "figure loss/distill": ("figures", [{**ranks[1]["figures"][0], "loss/distill": 0.5}]),
        "has no gradient": ("errors", {**ranks[1]["errors"], name: (0.0, 0.0)}),
        "routers' gradients were compared": ("errors", {
            k: v for k, v in ranks[1]["errors"].items() if ".router." not in k}),
        "masks of layers": ("masks", {k: v for k, v in ranks[1]["masks"].items() if k != 4}),
    }  # fmt: skip
    for message, (key, value) in changes.items():
        both = [value if message in ("masks of layers", "routers' gradients were compared") else None, value]
        changed = [rank if v is None else rank | {key: v} for rank, v in zip(ranks, both, strict=True)]
        assert any(message in text for text in difference(c, changed, reference).over(c.tolerance)), message


def test_a_rank_that_fails_is_named(tmp_path):
    job = {"name": "no such model", "recipe": {"model": "?"}, "layout": {}, "options": {}, "reference": True}
    with pytest.raises(RuntimeError, match="no such model(.|\n)*KeyError"):
        run_ranks([job | {"folder": str(tmp_path)}], 1, tmp_path / "ranks")


def test_the_trap_of_strided_gradients(tmp_path):
    """Megatron 0.15.3 loses the sum over ranks when a gradient is a strided view; our copy does not."""
    (ranks,) = run_ranks([{"trap": True, "layout": {"tp": 2}}], 2, tmp_path / "ranks")
    whole = (2 * torch.arange(6.0).view(3, 2) + 10).t()
    for number, rank in enumerate(ranks):
        assert torch.equal(rank["ours"], whole)
        assert torch.equal(rank["megatron"], (torch.arange(6.0).view(3, 2) + 10 * number).t()), (
            "mended upstream?"
        )


def test_the_trap_of_two_interleaved_stages(tmp_path):
    """Batched, the exchange between two stages of two chunks takes gradients for activations: why it is refused."""
    wrong = case("batched", pp=2, vp=2, kvcat={"num_groups": 4}, config={"batch_p2p_comm": True})
    found = difference(wrong, *run_cases([wrong], tmp_path, unchecked=("batched",))["batched"])
    assert found.largest > 0.01, "mended upstream?"  # exchanged one by one it is exact, as the matrix shows


def test_micro_batch_sizes_agree_where_the_losses_are_means_of_equal_parts(one_process):
    """Without the budget term and with all tokens counted, however a step's windows are cut into micro-batches."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    text, _, mask = zip(*microbatches(windows=8, count=1), strict=True)
    tokens, labels = text[0], text[0].roll(-1, 1)
    found = []
    for windows in (1, 2, 4, 8):
        config = transformer_config(kvcat={"budget_weight": 0.0})
        model = build(config)
        enliven(model)
        chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
        cut = [x.split(windows) for x in (tokens, labels, torch.ones_like(mask[0]))]
        figures = train_step([chunk], config, batch=list(zip(*cut, strict=True)))
        found.append((figures, {name: p.main_grad.clone() for name, p in model.named_parameters()}))
    for figures, gradients in found[1:]:
        for name in ("loss/anchor", "loss/distill", "keep_rate", "ce_masked", "loss/total"):
            assert figures[name] == pytest.approx(found[0][0][name], rel=1e-12), name
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-10, atol=1e-13, msg=name)
