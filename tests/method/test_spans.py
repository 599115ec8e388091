"""Gates that apply to rows behind a cut alone: where the cuts are, and the oracle against the equation written as loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcat_nemo.method.attention import gated_attention_reference, span_gated_attention_reference
from kvcat_nemo.method.spans import Span, Spans

SCALE = 0.6


def inputs(B=2, T=7, H=4, G=2, D=3, seed=0, gate_heads=None):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, heads, D, generator=rng, dtype=torch.float64) for heads in (H, G, G))
    return q, k, v, torch.rand(B, T, gate_heads or G, generator=rng, dtype=torch.float64)


def by_loops(q, k, v, gate, cuts, bounds, sinks):
    """The equation, one query and slot at a time. cuts, bounds: places in the windows laid end to end."""
    B, T, H, D = q.shape
    out = torch.zeros_like(q)
    for b, i, h in itertools.product(range(B), range(T), range(H)):
        g = h // (H // k.shape[2])
        first = max(x for x in bounds if x <= b * T + i) - b * T
        start = max([x - b * T for x in cuts if x <= b * T + i] + [first])
        weights = {}
        for j in range(first, i + 1):
            plain = j >= start or j - first < sinks
            weights[j] = (1.0 if plain else float(gate[b, j, g if gate.shape[2] > 1 else 0])) * math.exp(
                float(q[b, i, h] @ k[b, j, g]) * SCALE
            )
        out[b, i, h] = sum(w * v[b, j, g] for j, w in weights.items()) / sum(weights.values())
    return out


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 6),
    shared=st.booleans(),
    hard=st.booleans(),
    sinks=st.integers(0, 3),
    cuts=st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=2, max_size=2),
    documents=st.none() | st.lists(st.integers(0, 12), max_size=3),
    seed=st.integers(0, 99),
)
def test_is_the_equation(B, T, shared, hard, sinks, cuts, documents, seed):
    q, k, v, gate = inputs(B, T, 4, 2, 3, seed, 1 if shared else 2)
    gate = gate.round() if hard else gate
    cuts = [[min(cut, T) for cut in row] for row in cuts[:B]]
    windows = {b * T for b in range(B + 1)}
    bounds = None if documents is None else sorted(windows | {min(x, B * T) for x in documents})
    spans = Spans.from_cuts(cuts, T, None if bounds is None else torch.tensor(bounds))
    got = span_gated_attention_reference(q, k, v, gate, spans=spans, scale=SCALE, sinks=sinks)
    places = [b * T + cut for b, row in enumerate(cuts) for cut in row if cut < T]
    expected = by_loops(q, k, v, gate, places, bounds or sorted(windows), sinks)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_where_a_window_is_cut():
    spans = Spans.from_cuts([[3], [0], [8], [5, 2, 5]], 8)
    assert spans.spans == (
        Span(0, 0, 0, 3), Span(0, 0, 3, 8), Span(1, 0, 0, 8), Span(2, 0, 0, 8),
        Span(3, 0, 0, 2), Span(3, 0, 2, 5), Span(3, 0, 5, 8),
    )  # fmt: skip
    assert spans.behind == (Span(0, 0, 3, 8), Span(3, 0, 2, 5), Span(3, 0, 5, 8))
    assert spans.gated_BT().sum(1).tolist() == [3, 0, 0, 5] and spans.behind_BT().sum(1).tolist() == [
        5,
        0,
        0,
        6,
    ]
    assert Spans.from_cuts(torch.tensor([[3, 3], [0, 8], [8, 0], [5, 2]]), 8) == spans
    assert Spans.from_table(spans.table(), 4, 8) == spans
    packed = Spans.from_cuts([[3, 6], []], 8, torch.tensor([0, 2, 6, 6, 8, 16]))
    assert packed.spans == (
        Span(0, 0, 0, 2),
        Span(0, 2, 2, 3),
        Span(0, 2, 3, 6),
        Span(0, 6, 6, 8),
        Span(1, 0, 0, 8),
    )
    assert packed.sinks_BT(1)[0].nonzero()[:, 0].tolist() == [0, 2, 6]


@pytest.mark.parametrize(
    "cuts,cu_seqlens,match",
    [
        ([[3], [9]], None, "cuts of window 1: 9 is no place in it; give 0 … 8"),
        ([[-1], []], None, "cuts of window 0: -1 is no place"),
        ([[2.5], []], None, "cuts of window 0: 2.5 is no place"),
        ([[3], [3]], [0, 9, 16], "a document of 0 … 9 lies in two windows of 8"),
        ([[3], [3]], [0, 8], "the documents have 8 tokens, the windows 2 × 8"),
    ],
)
def test_cuts_that_are_none(cuts, cu_seqlens, match):
    with pytest.raises(ValueError, match=match):
        Spans.from_cuts(cuts, 8, cu_seqlens)


def test_rows_before_the_cut_see_all_and_nothing_is_gated_at_0_and_t():
    q, k, v, gate = inputs(4, 7)
    plain = gated_attention_reference(q, k, v, torch.ones_like(gate), scale=SCALE)
    spans = Spans.from_cuts([[0], [7], [3], [6]], 7)
    got = span_gated_attention_reference(q, k, v, gate, spans=spans, scale=SCALE)
    for b, cut in enumerate((7, 7, 3, 6)):
        torch.testing.assert_close(got[b, :cut], plain[b, :cut], rtol=0, atol=1e-13)
        assert cut == 7 or (got[b, cut:] - plain[b, cut:]).abs().min() > 1e-4


def test_a_cut_before_every_row_is_gated_attention():
    """Spans of one row: that row sees every earlier slot through its gate, which is method.attention's first form."""
    q, k, v, gate = inputs(2, 9)
    spans = Spans.from_cuts([range(1, 9)] * 2, 9)
    for sinks in (0, 2):
        got = span_gated_attention_reference(q, k, v, gate, spans=spans, scale=SCALE, sinks=sinks)
        expected = gated_attention_reference(q, k, v, gate, scale=SCALE, sinks=sinks)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


SPANS = Spans.from_cuts([[3], [2, 4]], 6)


@pytest.mark.parametrize("sinks,gate_heads", [(0, 2), (1, 1)])
def test_gradients_of_soft_gates_q_k_and_v_equal_finite_differences(sinks, gate_heads):
    leaves = [x.requires_grad_() for x in inputs(2, 6, gate_heads=gate_heads)]
    run = lambda *x: span_gated_attention_reference(*x, spans=SPANS, scale=SCALE, sinks=sinks)  # noqa: E731
    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_of_hard_gates_equal_one_sided_differences():
    """Dropped slots too. Richardson's rule takes out the curvature of one side."""
    q, k, v, gate = inputs(2, 6)
    weight, gate = torch.randn_like(q), gate.round().requires_grad_()

    def loss(gate):
        return (span_gated_attention_reference(q, k, v, gate, spans=SPANS, scale=SCALE) * weight).sum()

    (grad,) = torch.autograd.grad(loss(gate), gate)
    gate, dropped = gate.detach(), 0
    at = loss(gate)
    for place in itertools.product(*map(range, gate.shape)):
        inward = 1.0 if gate[place] == 0 else -1.0

        def difference(h, place=place, inward=inward):
            moved = gate.clone()
            moved[place] += inward * h
            return (loss(moved) - at) / (inward * h)

        h = 1e-4
        estimate = (8 * difference(h / 4) - 6 * difference(h / 2) + difference(h)) / 3
        torch.testing.assert_close(grad[place], estimate, rtol=1e-6, atol=1e-7)
        gated = place[1] < (3, 4)[place[0]]
        assert gated or grad[place] == 0, "no row sees a slot of the last span through its gate"
        dropped += bool(gated and gate[place] == 0 and grad[place].abs() > 0.01)
    assert dropped > 3


def test_the_cap_scales_by_all_rows_behind_the_slot():
    q, k, v, gate = inputs(2, 6)
    gate = torch.zeros_like(gate).requires_grad_()
    weight = torch.randn_like(q)

    def gradient(**cap):
        out = span_gated_attention_reference(q, k, v, gate, spans=SPANS, scale=SCALE, **cap)
        return torch.autograd.grad((out * weight).sum(), gate)[0]

    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * SCALE
    first, start = SPANS.rows()
    j = torch.arange(6)
    causal = j <= j[:, None]
    own = (causal & (j >= start[..., None]))[:, None]
    level = s.masked_fill(~own, -math.inf).logsumexp(-1, keepdim=True)
    gated = (causal & (j >= first[..., None]) & (j < start[..., None]))[:, None]
    weights = ((s - level).exp() * gated).sum(2).unflatten(1, (2, 2)).mean(2).transpose(1, 2)  # [B, T, G]
    cap = float(weights[weights > 0].log().median())
    factor = (math.exp(cap) / weights).clamp(max=1)
    exact, capped = gradient(), gradient(gradient_cap=cap)
    torch.testing.assert_close(capped[weights > 0], (exact * factor)[weights > 0], rtol=1e-10, atol=1e-13)
    assert (factor < 0.9).any() and (factor == 1).any()
