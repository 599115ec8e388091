"""Packed documents: each trains as if it were alone in its window. Layouts of them are cases of the parallel matrix."""

import pytest
import torch

from tests.engine.small_models import MODELS, VOCAB, build, enliven, packed_positions, transformer_config

pytestmark = pytest.mark.usefixtures("one_process")

LENGTHS = [(7, 1, 12, 4), (13, 11)]
TOKENS = 24


def text(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (len(LENGTHS), TOKENS + 1), generator=rng)


def positions():
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


def documents():
    """(window, tokens of the document) in order."""
    for window, row in enumerate(LENGTHS):
        at = 0
        for n in row:
            yield window, slice(at, at + n)
            at += n


def model_of(name, **kvcat):
    config = transformer_config(name, {"budget_weight": 0.0} | kvcat)
    model = build(config, MODELS[name][2], max_tokens=TOKENS)
    enliven(model)
    return model


def gradients(model, metrics, weight):
    """Of the weighted losses to every parameter; the budget term, a mean over windows, is off."""
    loss = (metrics[:2] * weight).sum()
    parameters = dict(model.named_parameters())
    return dict(
        zip(parameters, torch.autograd.grad(loss, parameters.values(), allow_unused=True), strict=True)
    )


@pytest.mark.parametrize("backend", ["cpu", "oracle"])
@pytest.mark.parametrize("kvcat", [{}, {"sinks": 2, "recent_window": 3}], ids=["plain", "sinks and window"])
@pytest.mark.parametrize("name", MODELS)
def test_a_document_trains_as_if_alone(name, kvcat, backend):
    """Metrics of every token and gradients of every parameter, routers included, are the sum over documents alone."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from kvcat_nemo.engine.paired_model import document_boundaries

    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0, dtype=torch.float64))
    if "behind a cut" in name and kvcat:
        kvcat = {"sinks": 2}  # a row sees all slots behind the cut, recent or not
    model = model_of(name, attention_backend=backend, **kvcat)
    tokens = text()
    weight = torch.rand(
        2, *tokens[:, 1:].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    weight = weight[: 1 + model.config.kvcat.paired]
    boundaries = document_boundaries(positions())
    assert boundaries.tolist() == [0, 7, 8, 20, 24, 37, 48] and boundaries.dtype == torch.int32
    packed = model(tokens[:, :-1], positions(), boundaries, labels=tokens[:, 1:])
    ours = gradients(model, packed, weight)
    whole = model(tokens[:, :-1], positions(), None, labels=tokens[:, 1:])
    assert (packed - whole).abs().max() > 1e-3, "documents change something"
    total: dict = {}
    for window, at in documents():
        row = tokens[window : window + 1, at.start : at.stop + 1]
        place = torch.arange(row.shape[1] - 1)[None]
        alone = model(row[:, :-1], place, None, labels=row[:, 1:])
        torch.testing.assert_close(packed[:, window : window + 1, at], alone, rtol=1e-10, atol=1e-12)
        for key, grad in gradients(model, alone, weight[:, window : window + 1, at]).items():
            if grad is not None:
                total[key] = total.get(key, 0) + grad
    assert total.keys() == {key for key, grad in ours.items() if grad is not None}
    for key, grad in total.items():
        assert float((ours[key] - grad).abs().max()) <= 1e-10 * float(grad.abs().max()), key
    routers = [key for key in total if ".router." in key and float(total[key].abs().max()) > 1e-6]
    assert len(routers) > 10 or not name.startswith("router")


@pytest.mark.parametrize("name", ["random, tied", "attention, untied"])
def test_keep_rates_of_packed_documents(name):
    """The figure is the share of slots that attention really kept."""
    from kvcat_nemo.engine.layer import kvcat_layers
    from kvcat_nemo.engine.paired_model import document_boundaries
    from tests.engine.small_models import recorded_masks

    model = model_of(name)
    tokens = text(3)
    with recorded_masks([model]) as masks:
        model(tokens[:, :-1], positions(), document_boundaries(positions()), labels=tokens[:, 1:])
    for layer in kvcat_layers(model):
        for stats in layer.pop_stats():
            assert float(stats.keep_rate) == pytest.approx(float(masks[layer.layer_number][0][0].mean()))


def test_changing_a_document_changes_no_other():
    from kvcat_nemo.engine.paired_model import document_boundaries

    model = model_of("router, tied, q/k norms")
    tokens = text()
    run = lambda x: model(x[:, :-1], positions(), document_boundaries(positions()), labels=x[:, 1:]).detach()  # noqa: E731
    before = run(tokens)
    changed = tokens.clone()
    changed[0, 8:20] = (changed[0, 8:20] + 1) % VOCAB
    after = run(changed)
    same = torch.ones(TOKENS, dtype=torch.bool)
    same[7:20] = False  # the label of the token before is the changed document's first
    assert torch.equal(after[:, 0, same], before[:, 0, same]) and torch.equal(after[:, 1], before[:, 1])
    assert (after[0, 0, 8:20] != before[0, 0, 8:20]).all()


def test_positions_that_do_not_begin_at_zero_are_refused():
    from kvcat_nemo.engine.paired_model import document_boundaries

    with pytest.raises(ValueError, match="every window must begin with position 0"):
        document_boundaries(torch.tensor([[0, 1], [3, 4]]))


def test_a_mask_that_is_no_boundaries_is_refused():
    model = model_of("router, tied, q/k norms")
    tokens = text()
    with pytest.raises(ValueError, match=r"attention_mask \(1, 1, 24, 24\): .* or None"):
        model(tokens[:, :-1], positions(), torch.ones(1, 1, TOKENS, TOKENS).bool(), labels=tokens[:, 1:])


def test_packed_positions_of_the_matrix():
    place = packed_positions(3, 24, 5)
    assert (place[:, 0] == 0).all() and ((place[:, 1:] == place[:, :-1] + 1) | (place[:, 1:] == 0)).all()
    assert (place == 0).sum() > 6


def test_megatrons_dataset_gives_such_positions(tmp_path):
    """GPTDataset with reset_position_ids, as the data module sets it: a document begins after each end-of-document token."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    from kvcat_nemo.engine.paired_model import document_boundaries

    tokens = torch.tensor([5, 6, 0, 7, 0, 0, 8, 9])
    _, mask, place = _get_ltor_masks_and_position_ids(tokens, 0, True, True, True, False)
    assert place.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert document_boundaries(place[None]).tolist() == [0, 3, 5, 6, 8]
    assert mask.tolist() == [1, 1, 0, 1, 0, 0, 1, 1]
