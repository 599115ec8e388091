"""KVSculpt's error and gradient against autograd in float64; turns that only improve; budgets that move."""

from __future__ import annotations

import pytest
import torch

from kvcat_nemo.compress import Budget, LayerCache, make, next_logits, prefill
from kvcat_nemo.compress.attention_matching_fit import reference
from kvcat_nemo.compress.kvsculpt import Problem, allot, sculpt
from tests.support.hf_models import small_model, tokens


def problem(G=2, Q=60, T=30, K=5, D=8, E=6, ragged=True):
    torch.manual_seed(0)
    q, k = torch.randn(G, Q, D, dtype=torch.float64), torch.randn(G, T, D, dtype=torch.float64) * 2
    v = torch.randn(G, T, E, dtype=torch.float64)
    present = torch.ones(G, K, dtype=torch.bool)
    if ragged:
        present[1, 3:] = False
    made = Problem(q, reference(q, k, v, 0.5), present, 0.5, 0.3)
    return made, q, k, v


def plain_error(q, k, v, new_k, bias, new_v, scale, mass):
    """One head, the readable way."""
    full = q @ k.T * scale
    few = q @ new_k.T * scale + bias
    o, goal = few.softmax(-1) @ new_v, full.softmax(-1) @ v
    spread = (goal - goal.mean(0)).square().sum(-1).mean()
    return (o - goal).square().sum(-1).mean() / spread + mass * (
        few.logsumexp(-1) - full.logsumexp(-1)
    ).square().mean()


def test_error_and_gradient_are_those_of_autograd():
    made, q, k, v = problem()
    new_k = torch.randn(2, 5, 8, dtype=torch.float64)
    bias, new_v = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    error, to_k, to_bias = made.error(new_k, bias, new_v)
    for g, n in ((0, 5), (1, 3)):
        a, b = new_k[g, :n].clone().requires_grad_(True), bias[g, :n].clone().requires_grad_(True)
        expected = plain_error(q[g], k[g], v[g], a, b, new_v[g, :n], 0.5, 0.3)
        expected.backward()
        torch.testing.assert_close(error[g], expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(to_k[g, :n], a.grad, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(to_bias[g, :n], b.grad, rtol=1e-10, atol=1e-14)
        assert not to_k[g, n:].any() and not to_bias[g, n:].any()


def test_values_are_the_ridge_solution():
    made, q, k, v = problem(ragged=False)
    new_k, bias, old = (
        torch.randn(2, 5, 8).double(),
        torch.randn(2, 5).double(),
        torch.randn(2, 5, 6).double(),
    )
    got = made.values(new_k, bias, old, 1e-3)
    for g in range(2):
        x = (q[g] @ new_k[g].T * 0.5 + bias[g]).softmax(-1)
        goal = (q[g] @ k[g].T * 0.5).softmax(-1) @ v[g]
        normal = x.T @ x / 60 + 1e-3 * torch.eye(5, dtype=torch.float64)
        expected = torch.linalg.solve(normal, x.T @ goal / 60 + 1e-3 * old[g])
        torch.testing.assert_close(got[g], expected, rtol=1e-4, atol=1e-4)


def test_moving_keys_finds_slots_that_no_selection_has():
    """Attention over many slots that is exactly attention over two others."""
    torch.manual_seed(3)
    q = torch.randn(1, 200, 6, dtype=torch.float64)
    few_k, few_v = torch.randn(1, 2, 6, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)
    target = reference(q, few_k, few_v, 0.4)
    made = Problem(q, target, torch.ones(1, 2, dtype=torch.bool), 0.4, 0.5)
    start = few_k + 0.7 * torch.randn(1, 2, 6, dtype=torch.float64)
    bias = torch.zeros(1, 2, dtype=torch.float64)
    values = made.values(start, bias, few_v * 0, 1e-9)
    before = float(made.error(start, bias, values)[0])
    k, bias, v = sculpt(made, start, bias, few_v * 0, rounds=60, iterations=8, ridge=1e-9)
    after = float(made.error(k, bias, v)[0])
    assert before > 0.05 and after < 1e-7
    torch.testing.assert_close(k, few_k, rtol=0, atol=0.01)


def test_every_turn_lowers_the_error_of_every_head():
    made, q, k, v = problem()
    new_k, bias, new_v = k[:, :5], torch.zeros(2, 5, dtype=torch.float64), v[:, :5]
    errors = [made.error(new_k, bias, new_v)[0]]
    for _ in range(4):
        new_k, bias, new_v = sculpt(made, new_k, bias, v[:, :5], rounds=1, iterations=5, ridge=1e-8)
        errors.append(made.error(new_k, bias, new_v)[0])
    assert all(bool((b < a).all()) for a, b in zip(errors, errors[1:], strict=False))
    assert bool((errors[-1] < errors[0] / 4).all())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_beats_attention_matching_on_the_queries_it_was_given(kind):
    model = small_model(kind)
    prefilled = prefill(model, [tokens(60)])
    q = torch.randn(
        2, 120, prefilled.cache.layers[1].keys_BGSD.shape[-1], generator=torch.Generator().manual_seed(0)
    )
    layer = prefilled.cache.layers[1]
    errors = []
    for name in ("attention-matching", "kvsculpt:key_ridge=0"):
        smaller, target = make(name).compress_layer(layer, q, prefilled.scale, 6)
        made = Problem(q, target, smaller.present_BGS[0], prefilled.scale, 0.05)
        errors.append(made.error(smaller.keys_BGSD[0], smaller.bias_BGS[0], smaller.values_BGSE[0])[0])
    assert bool((errors[1] < errors[0]).all())


def test_keys_that_may_not_move_give_attention_matching():
    model = small_model()
    prefilled = prefill(model, [tokens(60)], needs=("queries",))
    held = make("kvsculpt:key_ridge=1e12:ridge=1e-5:adaptive=false").compress(prefilled, Budget(tokens=12))
    plain = make("attention-matching:queries=mixed:ridge=1e-5").compress(prefilled, Budget(tokens=12))
    for a, b in zip(held.layers, plain.layers, strict=True):
        torch.testing.assert_close(a.keys_BGSD, b.keys_BGSD, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.values_BGSE, b.values_BGSE, rtol=1e-3, atol=1e-3)


def test_adaptive_budgets_move_slots_and_keep_the_total():
    model = small_model()
    rows = [tokens(60, 1), tokens(44, 2)]
    prefilled = prefill(model, rows, needs=("queries",))
    kept = make("kvsculpt:rounds=1:adaptive=True").compress(prefilled, Budget(keep_fraction=0.25))
    counts = torch.stack([layer.slots_BG for layer in kept.layers], 1)
    assert counts.sum((1, 2)).tolist() == [15 * 6, 11 * 6]
    assert len(set(counts[0].flatten().tolist())) > 1
    ids = torch.tensor([tokens(4, 9)] * 2)
    alone = make("kvsculpt:rounds=1:adaptive=True").compress(
        prefill(model, rows[1:], needs=("queries",)), Budget(keep_fraction=0.25)
    )
    assert torch.equal(torch.stack([layer.slots_BG for layer in alone.layers], 1)[0], counts[1])
    assert torch.isfinite(next_logits(model, kept, ids)).all()


def test_allotment_follows_errors_within_bounds():
    errors = torch.tensor([[1.0, 4.0], [16.0, 1e-9]])
    counts = allot(errors, 10, 1000, 0.5)
    assert counts.sum() == 40 and counts[1, 1] == 2  # a quarter of 10, rounded down
    free = counts.flatten()[:3].double()
    torch.testing.assert_close(free / free.sum(), torch.tensor([1, 2, 4]).double() / 7, rtol=0.1, atol=0)
    assert allot(errors, 10, 12, 0.5).max() == 12 and allot(errors, 10, 12, 0.5).sum() == 40
    assert allot(errors, 1, 12, 0.5).tolist() == [[1, 1], [1, 1]]
    assert allot(errors, 7, 50, 0.0).tolist() == [[7, 7], [7, 7]]


def test_bf16_is_finite_and_close():
    model = small_model(dtype=torch.bfloat16)
    prefilled = prefill(model, [tokens(60)], needs=("queries",))
    kept = make("kvsculpt").compress(prefilled, Budget(tokens=12))
    for layer in kept.layers:
        assert layer.keys_BGSD.dtype == torch.bfloat16 and layer.values_BGSE.abs().max() < 1e3
        assert torch.isfinite(layer.bias_BGS[layer.present_BGS]).all() and isinstance(layer, LayerCache)


def test_refusals():
    for setting in ("rounds=0", "mass=-1", "iterations=0", "exponent=-1"):
        with pytest.raises(ValueError, match=setting):
            make(f"kvsculpt:{setting}")
