"""Gates for rows behind a cut, from fused kernels, against the float64 oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvcat_nemo.kernels import causal_attention, gated_attention, span_gated_attention
from kvcat_nemo.kernels.attention.overflow import HEADROOM
from kvcat_nemo.kernels.fused import cpu
from kvcat_nemo.kernels.fused.cpu import CpuKernel
from kvcat_nemo.method.attention import span_gated_attention_reference
from kvcat_nemo.method.spans import Spans
from tests.kernels.test_gated import DTYPES, LOCAL, NAMES, case, error, open_reference, plain_errors, run

PACKED = torch.tensor([0, 5, 6, 6, 100, 211], dtype=torch.int32)
CASES = {
    "one head, D 32": ((1, 211, 1, 1, 32), {}, [[100]], {}),
    "GQA, another cut in each window": ((4, 211, 6, 2, 64), {}, [[100], [0], [211], [7]], {}),
    "shared gates": ((2, 211, 6, 2, 64), {"shared": True}, [[100], [180]], {}),
    "large logits, D 96, low cap": ((1, 211, 4, 4, 96), {"spread": 2.0}, [[60]], {"gradient_cap": 3.0}),
    "several spans": ((2, 211, 4, 2, 64), {"gate": "mixed"}, [[30, 31, 150], [64, 128, 192]], {}),
    "soft gates, odd width": ((2, 211, 4, 2, 33), {"gate": "soft"}, [[1], [210]], {}),
    "sinks": ((2, 211, 4, 2, 64), {}, [[50], [2]], {"sinks": 3}),
    "lowest cap": ((1, 211, 4, 2, 64), {}, [[100]], {"gradient_cap": -1.0}),
    "packed": ((1, 211, 4, 2, 64), {"gate": "mixed"}, [[3, 50, 180, 190]], {"sinks": 2, "packed": PACKED}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_the_plain_kernels(name, dtype):
    """As test_gated's: the gates' gradients are held to the plain kernel's gradient with the largest error.

    In float64 the oracle rounds as the kernels do: sums of T terms, at 1.1e-16·√T ≈ 1.6e-15 each, some of one after another.
    """
    shape, inputs, cuts, settings = CASES[name]
    *tensors, do = case(*shape, dtype=dtype, **inputs)
    packed = {"cu_seqlens": settings["packed"]} if "packed" in settings else {}
    settings = {k: v for k, v in settings.items() if k != "packed"}
    settings["spans"] = Spans.from_cuts(cuts, shape[1], packed.get("cu_seqlens"))
    ours = run(span_gated_attention, tensors, do, **settings)
    expected = run(span_gated_attention_reference, tensors, do, wide=True, **settings)
    assert [x.dtype for x in ours] == [dtype] * 4 + [tensors[3].dtype]
    plain = plain_errors(tensors, do, **packed)
    for what, value, other, allowed in zip(NAMES, ours, expected, [*plain, max(plain)], strict=True):
        oracle = 1e-14 if dtype == torch.float64 else 0.0
        assert error(value, other) <= 2 * allowed + oracle, (what, error(value, other) / allowed)
    hidden = (tensors[3] == 0) & settings["spans"].gated_BT()[..., None]
    assert inputs.get("gate") == "soft" or expected[4][hidden].abs().max() > 0.05


@pytest.mark.parametrize("bias", [False, True], ids=["", "biased"])
def test_stacked_heads_are_the_same_function(bias):
    """In 16 bits a short call stacks the heads of a KV head as rows (kernels/fused/cpu.py): errors against float64 stay the same."""
    n, m, kernel = 256, 300, CpuKernel()
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (
        torch.empty(2, t, heads, 16).normal_(generator=generator)
        for t, heads in ((n, 6), (m, 2), (m, 2), (n, 6))
    )
    beta = torch.empty(2, m, 2).uniform_(-2, 0, generator=generator) if bias else None

    def call(dtype):
        x = [t.to(dtype) for t in (q, k, v, do)]
        extra = {} if beta is None else {"key_bias_BTG": beta.to(dtype)}
        o, lse, saved = kernel.forward(*x[:3], scale=0.25, causal=False, **extra)
        grads = () if bias else kernel.backward(x[3], *x[:3], o, lse, saved, scale=0.25, causal=False)
        return [y.double() for y in (o, lse, *grads)]

    assert cpu._stacks(q.bfloat16(), k) and not cpu._stacks(q, k)
    for ours, exact in zip(call(torch.bfloat16), call(torch.float64), strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).norm() <= 2**-7 * exact.norm()


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    G=st.integers(1, 3),
    per_head=st.integers(1, 3),
    D=st.integers(1, 9),
    gate=st.sampled_from(["hard", "mixed", "soft"]),
    shared=st.booleans(),
    sinks=st.integers(0, 5),
    cap=st.sampled_from([-2.0, 0.0, 3.0, 30.0]),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    cuts=st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=3, max_size=3),
    documents=st.none() | st.lists(st.integers(0, 120), max_size=5),
    seed=st.integers(0, 99),
)
def test_any_shape(B, T, G, per_head, D, gate, shared, sinks, cap, spread, cuts, documents, seed):
    bounds = None
    if documents is not None:
        bounds = sorted({b * T for b in range(B + 1)} | {min(x, B * T) for x in documents})
    spans = Spans.from_cuts([[min(c, T) for c in row] for row in cuts[:B]], T, bounds)
    settings = {"spans": spans, "sinks": sinks, "gradient_cap": cap}
    *tensors, do = case(B, T, G * per_head, G, D, gate=gate, shared=shared, spread=spread, seed=seed)
    ours = run(span_gated_attention, tensors, do, **settings)
    expected = run(span_gated_attention_reference, tensors, do, wide=True, **settings)
    for value, other in zip(ours, expected, strict=True):
        size = float(other.abs().max().clamp(min=1))
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11 * size)


@pytest.mark.parametrize("backend", LOCAL)
def test_gradients_equal_finite_differences(backend):
    *leaves, _ = case(2, 6, 4, 2, 3, gate="soft")
    leaves = [x.double().requires_grad_() for x in leaves]
    settings = {"spans": Spans.from_cuts([[3], [2, 4]], 6), "scale": 0.6, "backend": backend}
    assert torch.autograd.gradcheck(lambda *x: span_gated_attention(*x, **settings), leaves)
    gate = leaves[3].detach().round()
    assert torch.autograd.gradcheck(lambda *x: span_gated_attention(*x, gate, **settings), leaves[:3])


@pytest.mark.parametrize("backend", LOCAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_spans_left_out_are_0_and_give_no_gradient(dtype, backend):
    """What the rows behind the cuts give is the same with them and without."""
    *tensors, do = case(3, 70, 4, 2, 32, dtype=dtype)
    spans = Spans.from_cuts([[20, 30], [0], [64]], 70)
    behind = spans.behind_BT()[:, :, None, None]
    settings = {"spans": spans, "backend": backend}
    alone = run(span_gated_attention, tensors, do, first_spans=False, **settings)
    all_rows = run(span_gated_attention, tensors, do * behind, **settings)
    assert torch.equal(alone[0], all_rows[0] * behind)
    bound = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert all(error(a, b) <= bound for a, b in zip(alone[1:], all_rows[1:], strict=True))
    plain = run(causal_attention, tensors[:3], do, backend=backend)
    first = all_rows[0] * ~behind
    assert error(first, plain[0] * ~behind) <= bound


def test_a_window_without_a_cut_is_plain_causal_attention_bit_for_bit():
    *tensors, do = case(2, 83, 4, 2, 32, dtype=torch.float32)
    ours = run(span_gated_attention, tensors, do, spans=Spans.from_cuts([[0], [83]], 83))
    plain = run(causal_attention, tensors[:3], do)
    assert all(error(a, b) <= 1e-6 for a, b in zip(ours[1:4], plain[1:], strict=True))
    alone = [run(causal_attention, [x[b : b + 1] for x in tensors[:3]], do[b : b + 1])[0] for b in (0, 1)]
    assert torch.equal(ours[0], torch.cat(alone)) and ours[4].abs().max() == 0


def test_spans_of_one_row_are_gated_attention():
    *tensors, do = case(2, 40, 4, 2, 16, gate="mixed")
    settings = {"sinks": 2, "gradient_cap": 1.0}
    ours = run(span_gated_attention, tensors, do, spans=Spans.from_cuts([range(1, 40)] * 2, 40), **settings)
    expected = run(gated_attention, tensors, do, **settings)
    assert all(error(a, b) <= 1e-13 for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("backend", LOCAL)
def test_dropped_slots_reach_no_row_behind_the_cut(backend):
    q, k, v, gate, _ = case(1, 37, 4, 2, 32, dtype=torch.float32)
    gate[:, 5] = 0
    settings = {"spans": Spans.from_cuts([[20]], 37), "scale": 0.2, "backend": backend}
    loud = v.clone()
    loud[:, 5] = 1e30
    before, after = (span_gated_attention(q, k, x, gate, **settings) for x in (v, loud))
    reached = (before != after).flatten(2).any(2)[0]
    assert reached.nonzero()[:, 0].tolist() == list(range(5, 20))


@pytest.mark.parametrize("everyone", [False, True], ids=["one slot", "every dropped slot"])
@pytest.mark.parametrize("gap", [40.0, 83.0, 160.0, 500.0, -500.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_slots_may_exceed_the_visible_ones_by_any_gap(dtype, gap, everyone):
    from tests.kernels.test_gated import dominated

    *tensors, do = dominated(gap, dtype, everyone=everyone)
    settings = {"gradient_cap": 3.0, "scale": 1 / 8, "spans": Spans.from_cuts([[60, 90]], 150)}
    if everyone:  # the plain slots of a row's own span are quiet, as the visible ones are
        settings["spans"] = Spans.from_cuts([range(1, 150)], 150)
    ours = run(span_gated_attention, tensors, do, **settings)
    expected = run(span_gated_attention_reference, tensors, do, wide=True, **settings)
    plain = plain_errors(tensors, do, scale=1 / 8)
    large = 1 + abs(gap) / 40  # a key this long makes rounding of every logit larger
    eps = {torch.float64: 4e-15 * large, torch.float32: 2e-6 * large, torch.bfloat16: 2e-2}[dtype]
    for what, value, other, allowed in zip(NAMES, ours, expected, [*plain, max(plain)], strict=True):
        assert error(value, other) <= max(2 * allowed, eps), (what, error(value, other), allowed)
    quiet = (
        (tensors[3] == 0) & (torch.arange(150)[None, :, None] != 3) & settings["spans"].gated_BT()[..., None]
    )
    if not everyone:
        assert error(ours[4][quiet], expected[4][quiet]) <= eps and expected[4][quiet].norm() > 0.1


def test_backward_is_repeated_only_when_numbers_would_end(monkeypatch):
    from tests.kernels.test_gated import dominated

    calls, backward = [], CpuKernel.backward
    monkeypatch.setattr(CpuKernel, "backward", lambda *x, **y: calls.append(1) or backward(*x, **y))
    spans = Spans.from_cuts([[60]], 150)
    for gap, times in ((0.0, 3), (HEADROOM - 10, 3), (HEADROOM + 10, 4)):
        *tensors, do = dominated(gap, torch.float32)
        calls.clear()
        run(span_gated_attention, tensors, do, scale=1 / 8, spans=spans)
        assert len(calls) == times, gap


@pytest.mark.parametrize("name", ["GQA, another cut in each window", "several spans", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_without_a_bias_for_keys_gets_columns(monkeypatch, dtype, name):
    """As Transformer Engine's and flash-attn's."""
    monkeypatch.setattr(CpuKernel, "takes_key_bias", False)
    test_errors_are_at_most_twice_the_plain_kernels(name, dtype)


def test_context_and_answer_rows_as_kv_distill_needs_them():
    """arXiv 2503.10337: context rows see each other whole, answer rows see the chosen context slots by σ(score).

    Windows have contexts of different lengths, of which other numbers of slots are chosen. The scores of chosen slots get
    a gradient; those of the others none, for σ(score)·chosen is 0 whatever they are.
    """
    q, k, v, _, do = case(3, 48, 4, 2, 16)
    contexts, chosen_fraction = [10, 33, 47], [0.5, 0.1, 1.0]
    rng = torch.Generator().manual_seed(5)
    score = torch.randn(3, 48, 1, generator=rng, dtype=torch.float64)
    chosen = torch.zeros_like(score)
    for b, (n, fraction) in enumerate(zip(contexts, chosen_fraction, strict=True)):
        chosen[b, score[b, :n, 0].topk(math.ceil(fraction * n)).indices] = 1
    leaves = [x.clone().requires_grad_() for x in (q, k, v, score)]
    gate = leaves[3].sigmoid() * chosen
    out = span_gated_attention(
        *leaves[:3], gate, spans=Spans.from_cuts([[n] for n in contexts], 48), scale=0.25
    )
    grads = torch.autograd.grad((out * do).sum(), leaves)
    # The same, window by window, as a compressor does it: the slots that were not chosen are taken away.
    theirs = [x.clone().requires_grad_() for x in (q, k, v, score)]
    total = 0
    for b, n in enumerate(contexts):
        rows = [x[b].transpose(0, 1) for x in theirs[:3]]
        keys, values = (x.repeat_interleave(2, 0) for x in rows[1:])
        kept = chosen[b, :n, 0].nonzero()[:, 0]
        context = torch.nn.functional.scaled_dot_product_attention(
            rows[0][None, :, :n], keys[None, :, :n], values[None, :, :n], is_causal=True, scale=0.25
        )[0]
        slots = torch.cat([kept, torch.arange(n, 48)])
        bias = torch.zeros(48 - n, len(slots), dtype=torch.float64)
        bias[:, len(kept) :] = torch.full((48 - n, 48 - n), -math.inf, dtype=torch.float64).triu(1)
        logits = rows[0][:, n:] @ keys[:, slots].transpose(1, 2) * 0.25 + bias
        weights = torch.nn.functional.logsigmoid(theirs[3][b, kept, 0])
        logits = logits + torch.cat([weights, weights.new_zeros(48 - n)])
        both = torch.cat([context, logits.softmax(-1) @ values[:, slots]], 1).transpose(0, 1)
        assert error(out[b].detach(), both.detach()) <= 1e-14
        total = total + (both * do[b]).sum()
    for ours, other in zip(grads, torch.autograd.grad(total, theirs), strict=True):
        assert error(ours, other) <= 1e-13
    assert (grads[3][chosen == 1].abs() > 1e-6).all() and grads[3][chosen == 0].abs().max() == 0


def test_memory_is_linear_in_tokens():
    from tests.kernels.test_gated import largest_tensor

    def largest(T, gap=0.0, cuts=None, **settings):
        *tensors, do = case(1, T, 2, 1, 2)
        tensors[3][:] = 1
        tensors[3][:, 3] = 0
        tensors[0][..., 0], tensors[1][:, 3, :, 0] = 1, gap
        spans = Spans.from_cuts([cuts or [T // 2]], T)
        return largest_tensor(
            lambda: run(span_gated_attention, tensors, do, spans=spans, scale=1.0, **settings)
        )

    assert largest(1024, backend="oracle") >= 1024**2  # the measure does see such a matrix
    for settings in ({}, {"gap": 300.0}):
        small, large = largest(1024, backend="cpu", **settings), largest(4096, backend="cpu", **settings)
        assert large <= 4.1 * small, settings


def test_refusals():
    q, k, v, gate, _ = case(2, 5, 4, 2, 4, dtype=torch.float32)
    spans = Spans.from_cuts([[2], [3]], 5)

    def refused(match, *tensors, **settings):
        with pytest.raises(ValueError, match=match):
            span_gated_attention(*(tensors or (q, k, v, gate)), **{"spans": spans, "scale": 1.0} | settings)

    refused("attention_backend='plain'", backend="plain")
    refused(r"gate \(2, 5, 4\)", q, k, v, gate.repeat(1, 1, 2))
    refused("G dividing H", q[:, :, :3], k, v, gate)
    refused("spans of 2 windows of 6 tokens: q has 2 of 5", spans=Spans.from_cuts([[2], [3]], 6))
    refused("float16.*bfloat16 or float32", *(x.half() for x in (q, k, v)), gate)


def test_open_reference_is_what_the_oracle_of_spans_gives_with_open_gates():
    *tensors, do = case(2, 30, 4, 2, 8)
    tensors[3] = torch.ones_like(tensors[3])
    spans = Spans.from_cuts([[4], [9, 20]], 30)
    ours = run(span_gated_attention, tensors, do, spans=spans)
    expected = run(open_reference, tensors[:3], do)
    assert all(error(a, b) <= 1e-13 for a, b in zip(ours[:4], expected, strict=True))
