"""Every backend of gated attention against the oracle, and plain causal attention as gated attention of gates one."""

import pytest
import torch

from kvcat_nemo.kernels import causal_attention, gated_attention
from kvcat_nemo.kernels.gated import BACKENDS
from kvcat_nemo.method.attention import gated_attention_reference

# Absolute error allowed, forward and gradients, at logits of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}

SHAPES = {  # B, T, H, G, D, gate heads
    "one head": (1, 9, 1, 1, 4, 1),
    "heads": (2, 16, 4, 4, 8, 1),
    "GQA, gate per token": (2, 17, 6, 2, 8, 1),
    "GQA, gate per KV head": (2, 17, 6, 2, 8, 2),
    "one token": (2, 1, 4, 2, 4, 2),
    "several blocks": (1, 300, 2, 1, 4, 1),
}
VISIBLE = [{}, {"sinks": 3}, {"recent_window": 4}, {"sinks": 1, "recent_window": 2}, {"gradient_cap": 0.5}]


def case(shape, hard, seed=0):
    B, T, H, G, D, gate_heads = shape
    rng = torch.Generator().manual_seed(seed)
    sizes = [(B, T, H, D), (B, T, G, D), (B, T, G, D), (B, T, H, D)]
    q, k, v, weight = (torch.randn(size, generator=rng, dtype=torch.float64) for size in sizes)
    gate = torch.rand(B, T, gate_heads, generator=rng, dtype=torch.float64)
    return q, k, v, gate.round() if hard else gate, weight


def run(function, tensors, weight, **settings):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, scale=0.5, **settings)
    return out, torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)


@pytest.mark.parametrize("settings", VISIBLE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_equals_the_oracle(backend, dtype, shape, settings):
    for hard in (True, False):
        *tensors, weight = case(SHAPES[shape], hard)
        # Both see the rounded inputs: what is compared is the arithmetic. Gates stay in float32, as routers make them.
        low = [x.to(dtype) for x in tensors[:3]]
        low.append(tensors[3].to(torch.promote_types(dtype, torch.float32)))
        expected, expected_grads = run(
            gated_attention_reference, [x.double() for x in low], weight.to(dtype), **settings
        )
        out, grads = run(gated_attention, low, weight, backend=backend, **settings)
        assert out.dtype == dtype and [g.dtype for g in grads] == [x.dtype for x in low]
        bounds = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(out.double(), expected, **bounds)
        for grad, other in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad.double(), other, **bounds)
        if expected_grads[3].numel() > 8 and "recent_window" not in settings:
            assert expected_grads[3].abs().max() > 0.05


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_attention_is_gated_attention_with_open_gates(shape, dtype):
    q, k, v, gate, weight = case(SHAPES[shape], hard=True)
    low = [x.to(dtype) for x in (q, k, v)]
    open_gate = torch.ones_like(gate)
    expected, expected_grads = run(
        lambda *x, scale: gated_attention_reference(*x, open_gate, scale=scale),
        [x.double() for x in low],
        weight.to(dtype),
    )
    out, grads = run(causal_attention, low, weight)
    bounds = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(out.double(), expected, **bounds)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), other, **bounds)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_canary(backend, dtype):
    """What a dropped slot holds reaches no output but its own row's."""
    q, k, v, _, _ = (x.to(dtype) for x in case(SHAPES["GQA, gate per KV head"], True))
    gate = torch.ones(2, 17, 2)
    gate[:, 5] = 0
    before = gated_attention(q, k, v, gate, scale=0.5, backend=backend)
    others = [i for i in range(17) if i != 5]
    loud = v.clone()
    loud[:, 5] = 1e30
    after = gated_attention(q, k, loud, gate, scale=0.5, backend=backend)
    assert torch.equal(after[:, others], before[:, others]) and not torch.equal(after[:, 5], before[:, 5])
    far = k.clone()
    far[:, 5] *= 200
    after = gated_attention(q, far, v, gate, scale=0.5, backend=backend)
    torch.testing.assert_close(
        after[:, others], before[:, others], rtol=0, atol=TOLERANCE[dtype], check_dtype=True
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_slot_500_logits_above_the_rest(backend, dtype):
    q = torch.ones(1, 4, 2, 1, dtype=dtype, requires_grad=True)
    k = torch.tensor([500.0, 0, 0, 0], dtype=dtype).view(1, 4, 1, 1).requires_grad_()
    v = torch.tensor([9.0, 1, 2, 3], dtype=dtype).view(1, 4, 1, 1).requires_grad_()
    gate = torch.tensor([0.0, 1, 1, 1]).view(1, 4, 1).requires_grad_()
    out = gated_attention(q, k, v, gate, scale=1.0, backend=backend)
    assert out[0, :, 1, 0].tolist() == pytest.approx([9, 1, 1.5, 2], rel=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v, gate)))


def refused(match, *, gate=None, q=None, k=None, v=None, **settings):
    B, T, H, G, D = 2, 5, 4, 2, 3
    q = torch.zeros(q or (B, T, H, D))
    k, v = torch.zeros(k or (B, T, G, D)), torch.zeros(v or (B, T, G, D))
    with pytest.raises(ValueError, match=match):
        gated_attention(q, k, v, torch.ones(gate or (B, T, 1)), scale=1.0, **settings)


def test_refusals():
    refused("cu_seqlens", cu_seqlens=torch.tensor([0, 5]))
    refused("backend='flash'.*auto, plain, oracle", backend="flash")
    refused(r"gate \(2, 5, 4\).*\[2, 5, 2\] or \[2, 5, 1\]", gate=(2, 5, 4))
    refused(r"gate \(2, 5\)", gate=(2, 5))
    refused("G dividing H", q=(2, 5, 3, 3))
    refused(r"k \(2, 4, 2, 3\)", k=(2, 4, 2, 3))
    refused(r"v \(2, 5, 1, 3\)", v=(2, 5, 1, 3))


def test_no_matrix_of_tokens_by_tokens():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    T = 1024
    tensors = [torch.randn(1, T, 1, 2, requires_grad=True) for _ in range(3)]
    gate = torch.ones(1, T, 1, requires_grad=True)
    measured = {}
    for backend in BACKENDS:
        with Largest() as mode:
            gated_attention(*tensors, gate, scale=1.0, backend=backend).sum().backward()
        measured[backend] = mode.numbers
    assert measured["plain"] <= T * T / 4
    assert measured["oracle"] >= T * T  # the measure does see one
