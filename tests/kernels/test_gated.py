"""Gated attention from fused kernels against the float64 oracle, and what no dropped slot may do."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvcat_nemo.kernels import causal_attention, gated_attention
from kvcat_nemo.kernels.attention.overflow import HEADROOM
from kvcat_nemo.kernels.fused.cpu import CpuKernel
from kvcat_nemo.kernels.fused.selection import BACKENDS, select_backend
from kvcat_nemo.method.attention import gated_attention_reference
from tests.kernels import rounding

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NAMES = ("o", "dq", "dk", "dv", "dgate")
LOCAL = ["cpu", "oracle"]  # the backends that run everywhere


def case(B, T, H, G, D, *, dtype=torch.float64, gate="hard", shared=False, spread=1.0, seed=0):
    """q, k, v, gate, do; logits of standard deviation spread²."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(B, T, heads, D, generator=rng, dtype=torch.float64) for heads in (H, G, G, H))
    m = torch.rand(B, T, 1 if shared else G, generator=rng, dtype=torch.float64)
    if gate == "hard":
        m = m.round()
    elif gate == "mixed":  # shut, open and all between
        m = torch.where(m < 0.3, 0.0, torch.where(m > 0.7, 1.0, (m - 0.3) ** 4))
    q, k, v, do = ((x * s).to(dtype) for x, s in ((q, spread), (k, spread), (v, 1.0), (do, 1.0)))
    return q, k, v, m.to(torch.promote_types(dtype, torch.float32)), do


def run(function, tensors, do, wide=False, **settings):
    """[o, dq, dk, dv, dgate]; `wide`: in float64 from the same, rounded, numbers."""
    leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in tensors]
    settings.setdefault("scale", tensors[0].shape[-1] ** -0.5)
    out = function(*leaves, **settings)
    return [out.detach(), *torch.autograd.grad((out * do.to(out.dtype)).sum(), leaves)]


def error(value, expected):
    assert value.isfinite().all()
    return float((value.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def open_reference(q, k, v, **settings):
    return gated_attention_reference(q, k, v, q.new_ones(*q.shape[:2], 1), **settings)


def plain_errors(tensors, do, **settings):
    """Errors of o, dq, dk, dv of the plain fused kernel on the same q, k and v."""
    ours = run(causal_attention, tensors[:3], do, **settings)
    expected = run(open_reference, tensors[:3], do, wide=True, **settings)
    return [error(a, b) for a, b in zip(ours, expected, strict=True)]


PACKED = torch.tensor([0, 5, 6, 6, 100, 211], dtype=torch.int32)
CASES = {
    "one head, D 32": ((1, 211, 1, 1, 32), {}, {}),
    "GQA, D 64": ((2, 211, 6, 2, 64), {}, {}),
    "shared gates": ((2, 211, 6, 2, 64), {"shared": True}, {}),
    "large logits, D 96": ((1, 211, 4, 4, 96), {"spread": 2.0}, {"gradient_cap": 3.0}),
    "D 128": ((1, 211, 2, 1, 128), {}, {}),
    "mixed gates": ((1, 211, 4, 2, 64), {"gate": "mixed"}, {}),
    "soft gates": ((1, 211, 4, 2, 64), {"gate": "soft"}, {}),
    "sinks": ((1, 211, 4, 2, 64), {}, {"sinks": 3}),
    "window": ((1, 211, 4, 2, 64), {}, {"recent_window": 5}),
    "wide window, odd width, sinks": ((2, 211, 4, 2, 33), {"gate": "mixed"}, {"recent_window": 90, "sinks": 100}),
    "window beyond the end": ((1, 211, 4, 2, 64), {"gate": "mixed"}, {"recent_window": 300}),
    "low cap": ((1, 211, 4, 2, 64), {}, {"gradient_cap": -1.0}),
    "packed": ((1, 211, 4, 2, 64), {}, {"cu_seqlens": PACKED}),
    "packed, window, sinks": ((1, 211, 4, 2, 64), {"gate": "mixed"}, {"cu_seqlens": PACKED, "recent_window": 4, "sinks": 2}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_errors_are_at_most_twice_the_plain_kernels(name, dtype):
    """Twice what the plain kernel rounds on the same q, k and v, and what gates add to it: derived in rounding.py."""
    shape, inputs, settings = CASES[name]
    *tensors, do = case(*shape, dtype=dtype, **inputs)
    ours = run(gated_attention, tensors, do, **settings)
    expected = run(gated_attention_reference, tensors, do, wide=True, **settings)
    assert [x.dtype for x in ours] == [dtype] * 4 + [tensors[3].dtype]
    packed = {"cu_seqlens": settings["cu_seqlens"]} if "cu_seqlens" in settings else {}
    plain = plain_errors(tensors, do, **packed)
    allowed = rounding.allowed(tensors, do, plain, dtype, plain_settings=packed, **settings)
    for what, value, other in zip(NAMES, ours, expected, strict=True):
        assert error(value, other) <= allowed[what], (what, error(value, other) / allowed[what])
    if settings.get("recent_window", 1) < shape[1]:
        hidden = tensors[3] == 0
        assert inputs.get("gate") == "soft" or expected[4][hidden].abs().max() > 0.05


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 40),
    G=st.integers(1, 3),
    per_head=st.integers(1, 3),
    D=st.integers(1, 9),
    gate=st.sampled_from(["hard", "mixed", "soft"]),
    shared=st.booleans(),
    sinks=st.integers(0, 5),
    recent_window=st.integers(1, 45),
    cap=st.sampled_from([-2.0, 0.0, 3.0, 30.0]),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
    cuts=st.none() | st.lists(st.integers(0, 40), max_size=4),
    seed=st.integers(0, 99),
)
def test_any_shape(B, T, G, per_head, D, gate, shared, sinks, recent_window, cap, spread, cuts, seed):
    settings = {"sinks": sinks, "recent_window": recent_window, "gradient_cap": cap}
    if cuts is not None:
        B = 1
        settings["cu_seqlens"] = torch.tensor([0, *sorted(min(c, T) for c in cuts), T], dtype=torch.int32)
    *tensors, do = case(B, T, G * per_head, G, D, gate=gate, shared=shared, spread=spread, seed=seed)
    ours = run(gated_attention, tensors, do, **settings)
    expected = run(gated_attention_reference, tensors, do, wide=True, **settings)
    for value, other in zip(ours, expected, strict=True):
        size = float(other.abs().max().clamp(min=1))
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11 * size)


@pytest.mark.parametrize("settings", [{}, {"recent_window": 3, "sinks": 2}], ids=str)
def test_packed_documents_equal_separate_calls(settings):
    *tensors, do = case(1, 90, 4, 2, 16, gate="mixed")
    bounds = [0, 1, 30, 33, 90]
    packed = run(gated_attention, tensors, do, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **settings)
    for a, b in zip(bounds, bounds[1:], strict=False):
        alone = run(gated_attention, [x[:, a:b] for x in tensors], do[:, a:b], **settings)
        for value, other in zip(packed, alone, strict=True):
            torch.testing.assert_close(value[:, a:b], other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", LOCAL)
def test_with_every_earlier_slot_dropped_a_row_is_its_own_value(backend, dtype):
    *tensors, do = case(2, 70, 4, 2, 32, dtype=dtype, spread=3.0)
    tensors[3] = torch.zeros_like(tensors[3])
    o, dq, dk, dv, dgate = run(gated_attention, tensors, do, backend=backend)
    assert torch.equal(o, tensors[2].repeat_interleave(2, 2))
    assert dq.isfinite().all() and dk.isfinite().all() and dgate.isfinite().all()
    torch.testing.assert_close(dv.double(), do.double().unflatten(2, (2, 2)).sum(3), rtol=1e-2, atol=1e-2)
    assert dgate[:, :-1].abs().min() > 0 and dgate[:, -1].abs().max() == 0


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", LOCAL)
def test_what_a_dropped_slot_holds_reaches_no_row_but_its_own(backend, dtype, window):
    q, k, v, gate, _ = case(2, 37, 4, 2, 32, dtype=dtype)
    gate = torch.ones_like(gate)
    gate[:, 5] = 0
    call = lambda k, v: gated_attention(q, k, v, gate, scale=0.2, backend=backend, recent_window=window)  # noqa: E731
    before = call(k, v)
    near = range(5, 5 + window)
    others = [i for i in range(37) if i not in near]
    loud = v.clone()
    loud[:, 5] = 1e30
    after = call(k, loud)
    assert torch.equal(after[:, others], before[:, others])
    assert all(not torch.equal(after[:, i], before[:, i]) for i in near)
    far = k.clone()
    far[:, 5] *= 200
    after = call(far, v)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=bound, atol=bound)


def dominated(gap, dtype, *, window=1, everyone=False):
    """A case in which dropped slots exceed the visible logits by `gap` in every row: slot 3, or half of all slots."""
    q, k, v, gate, do = case(1, 150, 2, 1, 64, gate="hard")
    q[..., 0], k[..., 0] = 8.0, 0.0
    gate[:, 0] = gate[:, 3] = 0
    loud = gate[..., 0] == 0 if everyone else torch.arange(150)[None] == 3
    k[loud] = 0
    k[..., 0][loud] = gap
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    return q, k, v, gate.to(torch.promote_types(dtype, torch.float32)), do


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("everyone", [False, True], ids=["one slot", "every dropped slot"])
@pytest.mark.parametrize("gap", [0.0, 40.0, 83.0, 90.0, 160.0, 500.0, -500.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_slots_may_exceed_the_visible_ones_by_any_gap(dtype, gap, everyone, window):
    """Output and gradients are right, those of the gates too: the loud slot's, and the quiet slots' beside it."""
    *tensors, do = dominated(gap, dtype, everyone=everyone)
    settings = {"gradient_cap": 3.0, "scale": 1 / 8, "recent_window": window}
    ours = run(gated_attention, tensors, do, **settings)
    expected = run(gated_attention_reference, tensors, do, wide=True, **settings)
    plain = plain_errors(tensors, do, scale=1 / 8)
    # A key this long makes every logit's rounding u·|gap|, and so each weight's: 36·u·(1 + |gap|/40) is that once, over the
    # some 36·u of sums of T = 150 and D = 64 rounded terms (√(150 + 64) of them at random, times the merger's two sums).
    large = 1 + abs(gap) / 40
    eps = {torch.float64: 4e-15 * large, torch.float32: 2e-6 * large, torch.bfloat16: 2e-2}[dtype]
    for what, value, other, allowed in zip(NAMES, ours, expected, [*plain, max(plain)], strict=True):
        assert error(value, other) <= max(2 * allowed, eps), (what, error(value, other), allowed)
    quiet = (tensors[3] == 0) & (torch.arange(150)[None, :, None] != 3)
    if not everyone:
        assert error(ours[4][quiet], expected[4][quiet]) <= eps and expected[4][quiet].norm() > 0.1


def test_backward_is_repeated_only_when_numbers_would_end(monkeypatch):
    calls, backward = [], CpuKernel.backward
    monkeypatch.setattr(CpuKernel, "backward", lambda *x, **y: calls.append(1) or backward(*x, **y))
    for gap, times in ((0.0, 1), (HEADROOM - 10, 1), (HEADROOM + 10, 2), (500.0, 2)):
        *tensors, do = dominated(gap, torch.float32)
        calls.clear()
        run(gated_attention, tensors, do, scale=1 / 8)
        assert len(calls) == times, gap


@pytest.mark.parametrize("name", ["GQA, D 64", "mixed gates", "packed, window, sinks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_without_a_bias_for_keys_gets_columns(monkeypatch, dtype, name):
    """As Transformer Engine's and flash-attn's."""
    monkeypatch.setattr(CpuKernel, "takes_key_bias", False)
    test_errors_are_at_most_twice_the_plain_kernels(name, dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_causal_attention(dtype, packed):
    *tensors, do = case(1, 83, 4, 2, 30, dtype=dtype)
    settings = {"cu_seqlens": torch.tensor([0, 3, 50, 83], dtype=torch.int32)} if packed else {}
    ours = run(causal_attention, tensors[:3], do, **settings)
    expected = run(open_reference, tensors[:3], do, wide=True, **settings)
    bound = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert all(error(a, b) <= bound for a, b in zip(ours, expected, strict=True))
    oracle = run(causal_attention, tensors[:3], do, backend="oracle", **settings)
    assert all(error(a, b) <= bound for a, b in zip(oracle, expected, strict=True))
    gates = torch.ones(1, 83, 1, dtype=torch.promote_types(dtype, torch.float32))
    gated = run(gated_attention, [*tensors[:3], gates], do, **settings)
    assert all(error(a, b) <= bound for a, b in zip(gated[:4], expected, strict=True))


def largest_tensor(call) -> int:
    """Numbers of the largest tensor that any operator makes while `call` runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
            return out

    with Largest() as mode:
        call()
    return mode.numbers


def test_memory_is_linear_in_tokens():
    def largest(T, backend, gap=0.0, **settings):
        *tensors, do = case(1, T, 2, 1, 2)
        tensors[3][:] = 1
        tensors[3][:, 3] = 0
        tensors[0][..., 0], tensors[1][:, 3, :, 0] = 1, gap
        return largest_tensor(
            lambda: run(gated_attention, tensors, do, backend=backend, scale=1.0, **settings)
        )

    assert largest(1024, "oracle") >= 1024**2  # the measure does see such a matrix
    for settings in ({}, {"recent_window": 100}, {"gap": 300.0}):
        small, large = largest(1024, "cpu", **settings), largest(4096, "cpu", **settings)
        assert large <= 4.1 * small, settings


def refused(match, *, gate=None, q=None, k=None, v=None, dtype=torch.float32, **settings):
    B, T, H, G, D = 2, 5, 4, 2, 3
    q = torch.zeros(q or (B, T, H, D), dtype=dtype)
    k, v = torch.zeros(k or (B, T, G, D), dtype=dtype), torch.zeros(v or (B, T, G, D), dtype=dtype)
    with pytest.raises(ValueError, match=match):
        gated_attention(q, k, v, torch.ones(gate or (B, T, 1)), scale=1.0, **settings)


def test_refusals():
    refused("attention_backend='plain'.*auto, cpu, te, flash, torch, oracle", backend="plain")
    refused(r"gate \(2, 5, 4\).*\[2, 5, 2\] or \[2, 5, 1\]", gate=(2, 5, 4))
    refused(r"gate \(2, 5\)", gate=(2, 5))
    refused("G dividing H", q=(2, 5, 3, 3))
    refused(r"k \(2, 4, 2, 3\)", k=(2, 4, 2, 3))
    refused(r"v \(2, 5, 1, 3\)", v=(2, 5, 1, 3))
    refused("recent_window=0.*at least 1", recent_window=0)
    refused("cu_seqlens.*2 windows.*one window", cu_seqlens=torch.tensor([0, 5]))
    refused("float16.*bfloat16 or float32", dtype=torch.float16)


def test_selection(monkeypatch):
    wanted = {"dtype": torch.bfloat16, "head_dim": 64}
    assert select_backend("auto", device="cpu", **wanted) == "cpu"
    assert select_backend("oracle", device="cpu", **wanted) == "oracle"
    with pytest.raises(ValueError, match="attention_backend=cpu: tensors are on cuda"):
        select_backend("cpu", device="cuda", **wanted)
    with pytest.raises(ValueError, match="no fused attention for meta"):
        select_backend("auto", device="meta", **wanted)
    with pytest.raises(ValueError, match="cpu: no torch.int8"):
        select_backend("cpu", device="cpu", head_dim=64, dtype=torch.int8)
    assert set(BACKENDS) == {"cpu", "te", "flash", "torch", "oracle"}


@pytest.fixture
def gpu(monkeypatch):
    """CUDA with the backends named: `installed` says which packages there are, `refuses` why a backend does not fit."""
    from kvcat_nemo.kernels.fused import selection

    def put(*installed, **refuses):
        class Kernel:
            def __init__(self, name):
                self.name = name

            def widths(self, qk, v):
                return qk, v

            def check(self, **what):
                if self.name in refuses:
                    raise ValueError(f"attention_backend={self.name}: {refuses[self.name]}")

        monkeypatch.setattr(selection, "_installed", lambda package: package in installed)
        monkeypatch.setattr(selection, "kernel", Kernel)
        monkeypatch.setattr(selection, "_said", set())

    return put


BOTH = ("transformer_engine", "flash_attn")


@pytest.mark.parametrize(
    ("installed", "refuses", "chosen"),
    [
        (BOTH, {}, "te"),
        (("flash_attn",), {}, "flash"),
        (("transformer_engine",), {}, "te"),
        ((), {}, "torch"),
        (BOTH, {"te": "no kernel for head dims (136, 136)"}, "flash"),
        (("transformer_engine",), {"te": "Transformer Engine 2.8 is not supported"}, "torch"),
        (BOTH, {"te": "cannot be loaded", "flash": "another interface"}, "torch"),
    ],
)
def test_auto_on_a_gpu_takes_the_first_that_fits(gpu, caplog, installed, refuses, chosen):
    gpu(*installed, **refuses)
    wanted = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 128}
    assert [select_backend("auto", **wanted) for _ in range(2)] == [chosen] * 2
    said = [r.getMessage() for r in caplog.records if r.name == "kvcat_nemo.attention"]
    assert len(said) == len(refuses)  # once each, with the reason
    for text, (name, why) in zip(said, refuses.items(), strict=True):
        assert text.startswith(f"attention backend {name} is passed over for {chosen}: ") and why in text


def test_auto_on_a_gpu_says_why_nothing_fits(gpu):
    gpu("flash_attn", flash="dtype torch.float32 does not fit", torch="built without FlashAttention")
    reasons = "te: transformer_engine is not installed; flash: .*torch.float32.*; torch: .*built without"
    with pytest.raises(ValueError, match=f"attention_backend=auto: no kernel fits on cuda: {reasons}"):
        select_backend("auto", device="cuda", dtype=torch.float32, head_dim=64)


def test_a_backend_that_is_asked_for_is_not_replaced(gpu):
    gpu(*BOTH, te="no kernel")
    with pytest.raises(ValueError, match="attention_backend=te: no kernel"):
        select_backend("te", device="cuda", dtype=torch.bfloat16, head_dim=64)


@pytest.mark.parametrize(("name", "package"), [("te", "transformer_engine"), ("flash", "flash_attn")])
def test_a_package_that_is_missing(monkeypatch, name, package):
    import importlib.util

    from kvcat_nemo.kernels.fused import selection

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x, *rest: None if x == package else real(x, *rest)
    )
    selection.kernel.cache_clear()
    with pytest.raises(ValueError, match=f"attention_backend={name}: the package {package} is not installed"):
        select_backend(name, device="cuda", dtype=torch.bfloat16, head_dim=64)


def test_the_choice_is_said_once(caplog):
    from kvcat_nemo.kernels import announce

    for width in (77, 77, 78):
        announce("auto", torch.zeros(1, 1, 1, width))
    said = [r.getMessage() for r in caplog.records if r.name == "kvcat_nemo.attention"]
    assert said == [f"attention backend: cpu (cpu, torch.float32, head dim {d})" for d in (77, 78)]
