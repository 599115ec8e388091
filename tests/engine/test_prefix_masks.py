"""Masks for rows behind a cut alone: rows before it are the dense half's bit for bit, and what that means for the losses."""

from types import SimpleNamespace

import pytest
import torch

from tests.engine.small_models import MODELS, VOCAB, build, enliven, packed_positions, transformer_config

pytestmark = pytest.mark.usefixtures("one_process")

NAME = "random behind a cut, tied"
TOKENS, WINDOWS = 96, 3
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


def model_of(dtype="float64", kvcat=None, **fields):
    half = {"bf16": True} if dtype == "bf16" else {}
    config = transformer_config(NAME, kvcat, dtype=DTYPES[dtype], hidden_size=40, **half | fields)
    model = build(config, MODELS[NAME][2], max_tokens=TOKENS)
    enliven(model)
    return model.to(DTYPES[dtype])


def batch(seed=0):
    text = torch.randint(0, VOCAB, (WINDOWS, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1], torch.arange(TOKENS).expand(WINDOWS, TOKENS), text[:, 1:]


def spans_of(model, tokens, documents=None):
    from kvcat_nemo.engine.paired_model import initial_gates
    from kvcat_nemo.method.spans import Spans

    gates, table = initial_gates(model.config.kvcat, tokens, documents=documents)
    return gates, Spans.from_table(table, *tokens.shape)


def round_by_place(model):
    """As a library whose matrix products sum rows of another tile in another order: the masked half's differ by rounding."""

    def otherwise(module, args, out):
        changed = out[0].clone()
        changed[:, WINDOWS:] *= 1 + 2 * torch.finfo(changed.dtype).eps
        return changed, out[1]

    products = [
        m for name, m in model.named_modules() if name.endswith(("linear_qkv", "linear_proj", "linear_fc2"))
    ]
    assert len(products) == 3 * 4
    for product in products:
        product.register_forward_hook(otherwise)


@pytest.mark.parametrize("uneven", [False, True], ids=["as it is", "products rounded by place"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_before_the_cut_are_the_dense_ones_bit_for_bit(monkeypatch, dtype, packed, uneven):
    """Hidden states after each layer, the keys and values that rows behind the cut read, cross-entropies; the KL is 0."""
    from kvcat_nemo.engine import core_attention
    from kvcat_nemo.engine.layer import kvcat_layers
    from kvcat_nemo.engine.paired_model import document_boundaries

    model = model_of(dtype)
    if uneven:
        round_by_place(model)
    tokens, position, labels = batch()
    documents = None
    if packed:
        position = packed_positions(WINDOWS, TOKENS, 1)
        documents = document_boundaries(position)
    _, spans = spans_of(model, tokens, documents)
    before = ~spans.behind_BT()
    assert 0.2 < before.double().mean() < 0.8 and len(spans.behind) >= WINDOWS
    hidden, slots, dense, plain, behind = (
        [],
        [],
        [],
        core_attention.causal_attention,
        core_attention.span_gated_attention,
    )

    def keep_dense(q, k, v, **settings):
        dense.append([x.detach().reshape(WINDOWS, TOKENS, *x.shape[2:]) for x in (k, v)])
        return plain(q, k, v, **settings)

    def keep_masked(q, k, v, *rest, **settings):
        slots.append([k.detach(), v.detach()])
        return behind(q, k, v, *rest, **settings)

    monkeypatch.setattr(core_attention, "causal_attention", keep_dense)
    monkeypatch.setattr(core_attention, "span_gated_attention", keep_masked)
    for layer in kvcat_layers(model):
        layer.register_forward_hook(lambda *x: hidden.append(x[2][0].detach().transpose(0, 1)))
    metrics = model(tokens, position, documents, labels=labels)
    assert len(hidden) == len(slots) == len(dense) == 4
    for layer, (x, masked, clean) in enumerate(zip(hidden, slots, dense, strict=True)):
        assert torch.equal(x[:WINDOWS][before], x[WINDOWS:][before]), layer
        assert not torch.equal(x[:WINDOWS][~before], x[WINDOWS:][~before])
        for ours, theirs in zip(masked, clean, strict=True):
            assert torch.equal(ours[before], theirs[before]), layer
        if layer:  # the embeddings are the same in both halves
            assert not torch.equal(masked[0][~before], clean[0][~before])
    ce, kl, ce_masked, top1 = metrics.detach()
    assert torch.equal(ce[before], ce_masked[before]) and (top1[before] == 1).all()
    assert (kl[before] == 0).all() and kl[~before].mean() > 1e-4


def test_sharing_rows_changes_no_figure_and_no_gradient(monkeypatch):
    """Against two halves that compute every row themselves: in float64 they agree to rounding."""
    from kvcat_nemo.engine import core_attention, layer

    model, (tokens, position, labels) = model_of(), batch()
    parameters = dict(model.named_parameters())
    weight = torch.rand(4, WINDOWS, TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[3] = 0  # top1 has no gradient

    def run():
        metrics = model(tokens, position, None, labels=labels)
        grads = torch.autograd.grad((metrics[:2] * weight[:2]).sum(), parameters.values())
        return metrics.detach(), grads

    shared, grads = run()

    class Apart:
        apply = staticmethod(lambda x, *unused: x)

    both = core_attention.span_gated_attention
    monkeypatch.setattr(
        core_attention, "span_gated_attention", lambda *x, **y: both(*x, **y | {"first_spans": True})
    )
    for module in (core_attention, layer):
        monkeypatch.setattr(module, "FirstSpansShared", Apart)
    apart, grads_apart = run()
    torch.testing.assert_close(shared, apart, rtol=1e-11, atol=1e-12)
    for name, ours, theirs in zip(parameters, grads, grads_apart, strict=True):
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max(), name


def test_shared_rows_and_their_gradient():
    from kvcat_nemo.engine.shared_rows import FirstSpansShared
    from kvcat_nemo.method.spans import Spans

    spans = Spans.from_cuts([[3], [0], [2, 6]], 8)
    x = torch.randn(8, 6, 2, dtype=torch.float64, requires_grad=True)
    out = FirstSpansShared.apply(x, spans)
    before = ~spans.behind_BT().T[..., None]
    expected = torch.cat([x[:, :3], torch.where(before, x[:, :3], x[:, 3:])], 1)
    assert torch.equal(out, expected)
    grad = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad((y * grad).sum(), x)[0] for y in (out, expected)))
    parts = [FirstSpansShared.apply(x[a : a + 2], spans, a) for a in range(0, 8, 2)]  # sequence parallelism
    assert torch.equal(torch.cat(parts), out)


def test_losses_of_rows_before_the_cut():
    """They count: their KL is 0 and each row behind a cut weighs 1/N, wherever its window is cut. The anchor is all rows'."""
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    model, (tokens, position, labels) = model_of(), batch()
    loss_mask = (torch.rand(WINDOWS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.8).double()
    metrics = model(tokens, position, None, labels=labels)
    loss, counted, sums = microbatch_loss(metrics, loss_mask, model.config.kvcat)
    figures = step_metrics([sums], [model], model.config.kvcat)
    gates, spans = spans_of(model, tokens)
    behind = spans.behind_BT()
    ce, kl = metrics[:2].detach()
    assert counted == loss_mask.sum()
    distill = float((kl * loss_mask)[behind].sum() / loss_mask.sum())
    anchor = float((ce * loss_mask).sum() / loss_mask.sum())
    assert figures["loss/distill"] == pytest.approx(distill, rel=1e-12) and distill > 0.01
    assert figures["loss/anchor"] == pytest.approx(anchor, rel=1e-12)
    assert float(loss.detach() / counted) == pytest.approx(anchor + distill, rel=1e-12)
    assert "loss/budget" not in figures and figures["loss/total"] == pytest.approx(
        anchor + distill, rel=1e-12
    )
    assert figures["behind"] == pytest.approx(float(behind.double().mean()), rel=1e-6)
    kept = [float(gate[spans.gated_BT()].mean()) for gate in gates]
    for group, value in enumerate(kept):
        assert figures[f"keep_rate/group{group}"] == pytest.approx(value, rel=1e-6)
    # The equal-token control, on the same weights: the anchor is its loss.
    control = model_of(kvcat={"policy": "none"})
    plain = control(tokens, position, None, labels=labels)
    torch.testing.assert_close(plain[0], metrics[0], rtol=0, atol=1e-12)


def test_a_window_of_one_token_has_nothing_behind_a_cut():
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    model = model_of()
    tokens, position, labels = (x[:, :1] for x in batch())
    metrics = model(tokens, position, None, labels=labels)
    assert (metrics[1] == 0).all() and torch.equal(metrics[0], metrics[2])
    _, _, sums = microbatch_loss(metrics, torch.ones(WINDOWS, 1), model.config.kvcat)
    figures = step_metrics([sums], [model], model.config.kvcat)
    assert figures["keep_rate"] == 1 and figures["behind"] == 0


def test_cuts_are_those_of_the_window_wherever_it_lies():
    model, (tokens, _, _) = model_of(), batch()
    gates, spans = spans_of(model, tokens)
    cuts = [s.start for s in spans.behind]
    assert len(set(cuts)) == WINDOWS
    gates_turned, turned = spans_of(model, tokens.flip(0))
    assert [s.start for s in turned.behind] == cuts[::-1] and torch.equal(gates_turned, gates.flip(1))
    for b in range(WINDOWS):
        gate, alone = spans_of(model, tokens[b : b + 1])
        assert alone.behind[0].start == cuts[b] and torch.equal(gate[:, 0], gates[:, b])
    _, other = spans_of(model_of(kvcat={"seed": 7}), tokens)
    assert [s.start for s in other.behind] != cuts


@pytest.mark.parametrize("multiple", [64, 100])
def test_cuts_that_no_window_could_have_are_refused(multiple):
    from kvcat_nemo.engine.cost import Layout
    from kvcat_nemo.method.config import KVCatConfig

    layout = Layout(1, 1, 1, False, False, micro_batch_size=1, global_batch_size=1, seq_length=64)
    config = SimpleNamespace(
        kvcat=KVCatConfig(policy="random", mask_span="prefix", prefix_cut_multiple=multiple),
        virtual_pipeline_model_parallel_size=None,
    )
    with pytest.raises(ValueError, match=f"prefix_cut_multiple={multiple}: no window of data.seq_length=64"):
        layout.check(config)
    config.kvcat.prefix_cut_multiple = 63
    layout.check(config)
