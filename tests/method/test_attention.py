"""The oracle of gated attention: its sums, its gradients (dropped slots included) and what a dropped slot may not do."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcat_nemo.method.attention import always_visible, gated_attention_reference

SCALE = 0.6


def inputs(B=2, T=7, H=4, G=2, D=3, seed=0, dtype=torch.float64, spread=1.0):
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(B, T, H, D, generator=rng, dtype=torch.float64) * spread
    k = torch.randn(B, T, G, D, generator=rng, dtype=torch.float64) * spread
    v = torch.randn(B, T, G, D, generator=rng, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v)]


def hard_gate(B=2, T=7, G=2, seed=3, keep=0.5, dtype=torch.float64):
    return (torch.rand(B, T, G, generator=torch.Generator().manual_seed(seed)) < keep).to(dtype)


def by_loops(q, k, v, gate, scale, sinks=0, recent=1):
    """METHOD's equation, one query at a time."""
    B, T, H, D = q.shape
    out = torch.zeros(B, T, H, v.shape[-1], dtype=q.dtype)
    for b, i, h in itertools.product(range(B), range(T), range(H)):
        g = h // (H // k.shape[2])
        weights = []
        for j in range(i + 1):
            free = j == i or j < sinks or i - j < recent
            own = 1.0 if free else float(gate[b, j, g if gate.shape[2] > 1 else 0])
            weights.append(own * math.exp(float(q[b, i, h] @ k[b, j, g]) * scale))
        out[b, i, h] = sum(w * v[b, j, g] for j, w in enumerate(weights)) / sum(weights)
    return out


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 6),
    G=st.integers(1, 3),
    per_head=st.integers(1, 3),
    D=st.integers(1, 4),
    sinks=st.integers(0, 7),
    recent=st.integers(1, 7),
    shared=st.booleans(),
    hard=st.booleans(),
    seed=st.integers(0, 99),
)
def test_is_the_equation(B, T, G, per_head, D, sinks, recent, shared, hard, seed):
    q, k, v = inputs(B, T, G * per_head, G, D, seed)
    gate = torch.rand(
        B, T, 1 if shared else G, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    gate = gate.round() if hard else gate
    got = gated_attention_reference(q, k, v, gate, scale=SCALE, sinks=sinks, recent_window=recent)
    torch.testing.assert_close(got, by_loops(q, k, v, gate, SCALE, sinks, recent), rtol=0, atol=1e-12)


def test_all_kept_is_softmax_attention():
    q, k, v = inputs()
    got = gated_attention_reference(q, k, v, torch.ones(2, 7, 2, dtype=q.dtype), scale=SCALE)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_always_visible_slots():
    free = always_visible(6, sinks=2, recent_window=2)
    for i, j in itertools.product(range(6), range(6)):
        assert free[i, j] == (j <= i and (j < 2 or i - j < 2))


@pytest.mark.parametrize("sinks,recent,shared", [(0, 1, False), (0, 1, True), (1, 2, False)])
def test_gradients_of_soft_gates_equal_finite_differences(sinks, recent, shared):
    leaves = [x.requires_grad_() for x in inputs(1, 5, 4, 2, 3)]
    gate = 0.1 + 0.9 * torch.rand(1, 5, 1 if shared else 2, dtype=torch.float64)
    leaves.append(gate.requires_grad_())
    run = lambda *x: gated_attention_reference(*x, scale=SCALE, sinks=sinks, recent_window=recent)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_of_q_k_v_under_a_hard_gate_equal_finite_differences():
    gate = hard_gate(1, 6)
    assert 0 < gate.mean() < 1
    leaves = [x.requires_grad_() for x in inputs(1, 6)]
    assert torch.autograd.gradcheck(lambda *x: gated_attention_reference(*x, gate, scale=SCALE), leaves)


def loss_of(q, k, v, gate, weight, **settings):
    return (gated_attention_reference(q, k, v, gate, scale=SCALE, **settings) * weight).sum()


def test_gradients_of_hard_gates_equal_one_sided_differences():
    """Dropped slots too: that is how one can come back. Richardson's rule takes out the curvature of one side."""
    q, k, v = inputs()
    weight, gate = torch.randn_like(q), hard_gate().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(q, k, v, gate, weight), gate)
    gate = gate.detach()
    at = loss_of(q, k, v, gate, weight)
    dropped = 0
    for place in itertools.product(*map(range, gate.shape)):
        inward = 1.0 if gate[place] == 0 else -1.0
        dropped += gate[place] == 0

        def difference(h, place=place, inward=inward):
            moved = gate.clone()
            moved[place] += inward * h
            return (loss_of(q, k, v, moved, weight) - at) / (inward * h)

        h = 1e-4
        estimate = (8 * difference(h / 4) - 6 * difference(h / 2) + difference(h)) / 3
        torch.testing.assert_close(grad[place], estimate, rtol=1e-6, atol=1e-7)
    assert dropped > 5 and grad[gate == 0].abs().max() > 0.1


@pytest.mark.parametrize("sinks,recent", [(0, 1), (2, 1), (0, 3)])
def test_gate_gradient_is_the_closed_form(sinks, recent):
    """Σ_i (e^{s_ij}/Z_i)·⟨∂L/∂o_i, v_j − o_i⟩ over queries that a gate can hide slot j from."""
    q, k, v = inputs(T=9)
    B, T, H, _ = q.shape
    gate, weight = hard_gate(T=9).requires_grad_(), torch.randn_like(q)
    settings = {"sinks": sinks, "recent_window": recent}
    (grad,) = torch.autograd.grad(loss_of(q, k, v, gate, weight, **settings), gate)
    o = gated_attention_reference(q, k, v, gate.detach(), scale=SCALE, **settings)
    free = always_visible(T, sinks, recent)
    expected = torch.zeros_like(grad)
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        g = h // 2
        e = (k[b, : i + 1, g] @ q[b, i, h] * SCALE).exp()
        visible = torch.where(free[i, : i + 1], torch.ones(()).double(), gate[b, : i + 1, g].detach())
        for j in range(i + 1):
            if not free[i, j]:
                share = e[j] / (visible * e).sum()
                expected[b, j, g] += share * (weight[b, i, h] @ (v[b, j, g] - o[b, i, h]))
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    assert grad[gate == 0].abs().max() > 0.05


def test_a_later_token_changes_no_earlier_output():
    q, k, v = inputs(dtype=torch.float32)
    gate = hard_gate(dtype=torch.float32)
    before = gated_attention_reference(q, k, v, gate, scale=SCALE)
    for t in range(1, 7):
        changed = [x.clone() for x in (q, k, v, gate)]
        for x in changed[:3]:
            x[:, t] += 5
        changed[3][:, t] = 1 - changed[3][:, t]
        after = gated_attention_reference(*changed, scale=SCALE)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


# The canary: what a dropped slot holds reaches no output but its own row's.

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}


def dropped_at(j, T=8, dtype=torch.float32):
    """Everything kept but slot j."""
    gate = torch.ones(2, T, 2, dtype=dtype)
    gate[:, j] = 0
    return gate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("j", [0, 3, 7])
def test_canary_value(dtype, j):
    q, k, v = inputs(T=8, dtype=dtype)
    gate = dropped_at(j, dtype=dtype)
    before = gated_attention_reference(q, k, v, gate, scale=SCALE)
    v[:, j] = 1e30
    after = gated_attention_reference(q, k, v, gate, scale=SCALE)
    others = [i for i in range(8) if i != j]
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.equal(after[:, j], before[:, j])
    kept = gated_attention_reference(q, k, v, torch.ones_like(gate), scale=SCALE)
    assert j == 7 or not torch.equal(kept[:, others], before[:, others])  # the canary can sing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("j", [0, 3, 7])
def test_canary_key(dtype, j):
    q, k, v = inputs(T=8, dtype=dtype)
    gate = dropped_at(j, dtype=dtype)
    before = gated_attention_reference(q, k, v, gate, scale=SCALE)
    k[:, j] = k[:, j] * 40 + 3
    after = gated_attention_reference(q, k, v, gate, scale=SCALE)
    others = [i for i in range(8) if i != j]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=DTYPES[dtype])
    assert j == 0 or not torch.equal(
        after[:, j], before[:, j]
    )  # row 0 sees one slot: any key gives it weight 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_every_earlier_slot_dropped_a_row_is_its_own_value(dtype):
    q, k, v = inputs(dtype=dtype, spread=5.0)
    out = gated_attention_reference(q, k, v, torch.zeros(2, 7, 1, dtype=dtype), scale=SCALE)
    assert torch.equal(out, v.repeat_interleave(2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [20.0, 85.0, 500.0, -500.0])
def test_a_dropped_slot_may_dominate_a_row_without_harm(dtype, gap):
    """Slot 0 exceeds the visible logits by `gap`: finite, equal to attention without it, finite gradients."""
    T, D = 5, 2
    q, k, v = (x[:, :, :1] for x in inputs(1, T, 2, 2, D, dtype=dtype))
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0] = 1
    k[:, 0, :, 0] = gap
    gate = torch.ones(1, T, 1, dtype=dtype)
    gate[:, 0] = 0
    leaves = [x.requires_grad_() for x in (q, k, v, gate)]
    out = gated_attention_reference(*leaves, scale=1.0)
    mean = torch.stack([v[:, 1 : i + 1].mean(1) for i in range(1, T)], 1)  # equal logits: a plain mean
    torch.testing.assert_close(out[:, 1:], mean, rtol=0, atol=DTYPES[dtype])
    assert torch.equal(out[:, :1], v[:, :1])
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("cap", [0.0, 5.0, 30.0])
def test_the_cap_bounds_gate_gradients_of_dropped_slots_alone(cap):
    """Up to the cap gradients are exact; above it the slot's weight is exp(cap) of the row's largest visible one."""
    q, k, v = (x[:, :, :1] for x in inputs(1, 2, 2, 2, 2))
    q, k = torch.ones_like(q), torch.zeros_like(k)
    gate = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64, requires_grad=True)
    for gap in (cap - 1, cap - 0.01, cap + 0.01, cap + 40):
        k[:, 0] = gap / 2  # ⟨q, k₀⟩ = gap, ⟨q, k₁⟩ = 0
        out = gated_attention_reference(q, k, v, gate, scale=1.0, gradient_cap=cap)
        (grad,) = torch.autograd.grad(out.sum(), gate)
        expected = math.exp(min(gap, cap)) * (v[0, 0] - v[0, 1]).sum()
        torch.testing.assert_close(grad[0, 0, 0], expected)
        assert torch.equal(out[:, 1], v[:, 1])
    # A kept slot far above the others is never capped.
    open_gate = torch.ones_like(gate).requires_grad_()
    out = gated_attention_reference(q, k, v, open_gate, scale=1.0, gradient_cap=cap)
    torch.testing.assert_close(out[:, 1], v[:, 0], rtol=0, atol=1e-6 if cap < 1e9 else 0)


@pytest.mark.parametrize("cap", [-30.0, -1.0, 9.0])
def test_the_cap_is_on_a_slots_weight_in_all_rows_together(cap):
    """Mean over the query heads of its KV head; sinks, recent window and other documents count for nothing."""
    q, k, v = inputs(1, 15, 4, 2, 3, spread=1.5)
    settings = {"scale": SCALE, "recent_window": 2, "cu_seqlens": torch.tensor([0, 11, 15])}
    gate = hard_gate(1, 15, 2).requires_grad_()

    def gradient(cap):
        out = gated_attention_reference(q, k, v, gate, gradient_cap=cap, **settings)
        return torch.autograd.grad((out * torch.arange(3.0)).sum(), gate)[0]

    exact, capped, scaled = gradient(60.0), gradient(cap), 0
    for j, g in itertools.product(range(15), range(2)):
        weight = 0.0
        for i, h in itertools.product(range(j + 2, 11 if j < 11 else 15), (2 * g, 2 * g + 1)):
            e = lambda slot, i=i, h=h, g=g: math.exp(float(q[0, i, h] @ k[0, slot, g]) * SCALE)  # noqa: E731
            first = 0 if i < 11 else 11
            visible = sum(e(s) for s in range(first, i + 1) if i - s < 2 or gate[0, s, g] > 0)
            weight += e(j) / visible / 2
        factor = 1.0 if gate[0, j, g] > 0 or not weight else min(1.0, math.exp(cap) / weight)
        scaled += factor < 1
        torch.testing.assert_close(capped[0, j, g], factor * exact[0, j, g])
    assert scaled >= 5 if cap < 0 else scaled == 0


def test_a_dropped_slot_gives_no_gradient_to_its_key_and_value():
    leaves = [x.requires_grad_() for x in inputs(T=8)]
    out = gated_attention_reference(*leaves, dropped_at(3, dtype=torch.float64), scale=SCALE)
    others = [i for i in range(8) if i != 3]
    weight = torch.randn_like(out)
    q, k, v = torch.autograd.grad((out * weight)[:, others].sum(), leaves)
    assert k[:, 3].abs().max() == 0 and v[:, 3].abs().max() == 0
    assert k[:, 2].abs().max() > 0 and q[:, 4].abs().max() > 0
