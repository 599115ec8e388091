"""Checks that any FusedKernel must pass, shared by the tests of flash-attn's and Transformer Engine's stand-ins.

The reference is PyTorch's autograd over a dense softmax in float64, document by document.
"""

from __future__ import annotations

import torch

from kvcat_nemo.doctor.kernel_oracle import random_case as case
from kvcat_nemo.doctor.kernel_oracle import reference
from tests.kernels import softmax_standin

SHAPES = {  # B, T, H, G, D, E
    "one head": (1, 7, 1, 1, 8, 8),
    "heads": (2, 12, 4, 4, 16, 16),
    "GQA": (2, 11, 6, 2, 72, 72),
    "unequal widths": (1, 9, 4, 2, 24, 16),
    "wide": (1, 6, 2, 1, 136, 136),
    "one token": (2, 1, 2, 2, 8, 8),
}
PACKED = [0, 5, 6, 13, 20]


def check(kernel, shape, *, dtype=torch.float64, window=None, packed=False, strided=False, bound=1e-12):
    """Forward and backward of the kernel against the reference, then backward with other o, lse, q, k and v."""
    if packed:
        shape = (1, PACKED[-1], *shape[2:])
    q, k, v, do = case(shape, dtype, strided=strided)
    cu_seqlens = torch.tensor(PACKED, dtype=torch.int32) if packed else None
    settings = {"scale": 0.37, "window": window, "cu_seqlens": cu_seqlens}
    o, lse, saved = kernel.forward(q, k, v, **settings)
    expected_o, expected_lse, *expected = reference(q, k, v, do, **settings)
    assert o.dtype == dtype and o.shape == do.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    torch.testing.assert_close(o.double(), expected_o, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=min(bound, 1e-6), atol=min(bound, 1e-6))
    grads = kernel.backward(do, q, k, v, o, lse, saved, **settings)
    for grad, other, like in zip(grads, expected, (q, k, v), strict=True):
        assert grad.dtype == dtype and grad.shape == like.shape
        torch.testing.assert_close(grad.double(), other, rtol=2 * bound, atol=4 * bound)
    # The contract of backward: it believes the o and the lse that it is given, and weights may exceed one.
    q, k, v, do = case(shape, dtype, seed=1, strided=strided)
    o, lse = o * 0.5 - 1, (lse - 2).transpose(1, 2).contiguous().transpose(1, 2)
    grads = kernel.backward(do, q, k, v, o, lse, saved, **settings)
    rows = softmax_standin.documents(cu_seqlens) if packed else [slice(None)] * q.shape[0]
    for row, at in enumerate(rows):
        row = 0 if packed else row
        piece = [x[row, at] for x in (do, q, k, v, o)]
        left = -1 if window is None else window - 1
        expected = softmax_standin.backward(*piece, lse[row][:, at], 0.37, left)
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad[row, at].double(), other, rtol=2 * bound, atol=60 * bound)


def check_split(kernel, shape, *, dtype=torch.float64, window=None, chunk=5, bound=1e-12):
    """The kernel under kernels.attention.context_parallel_kernel, every rank of 2 and of 3 in turn: together they give the whole window's."""
    from kvcat_nemo.kernels.attention.context_parallel import WindowSplit
    from kvcat_nemo.kernels.attention.context_parallel_kernel import SplitKernel

    for ranks in (2, 3):
        q, k, v, do = case((shape[0], 2 * ranks * chunk, *shape[2:]), dtype)
        settings = {"scale": 0.37, "window": window}
        expected_o, expected_lse, dq, dk, dv = reference(q, k, v, do, **settings)
        sums = [torch.zeros_like(k, dtype=torch.float64), torch.zeros_like(v, dtype=torch.float64)]
        for rank in range(ranks):
            split = WindowSplit(None, ranks, rank)
            own = split.positions(2 * chunk)
            assert own.tolist() == [c * chunk + i for c in (rank, 2 * ranks - 1 - rank) for i in range(chunk)]
            both = SplitKernel(kernel, split)
            o, lse, saved = both.forward(q[:, own], k, v, **settings)
            assert o.dtype == dtype
            torch.testing.assert_close(o.double(), expected_o[:, own], rtol=bound, atol=bound)
            torch.testing.assert_close(lse.double(), expected_lse[..., own], rtol=1e-6, atol=min(bound, 1e-6))
            grads = both.backward(do[:, own], q[:, own], k, v, o, lse, saved, **settings)
            torch.testing.assert_close(grads[0].double(), dq[:, own], rtol=2 * bound, atol=4 * bound)
            for total, grad in zip(sums, grads[1:], strict=True):
                total += grad
        for total, expected in zip(sums, (dk, dv), strict=True):
            torch.testing.assert_close(total, expected, rtol=2 * bound, atol=4 * bound)


GATED = {  # B, T, H, G, D, gate heads, cu_seqlens
    "GQA, gate per KV head": (2, 17, 6, 2, 64, 2, None),
    "gate per token, D 128": (1, 13, 4, 2, 128, 1, None),
    "packed": (1, 20, 4, 2, 64, 2, PACKED),
}


def gated_case(shape, dtype, *, dominant=0.0, empty=False):
    """(q, k, v, gate, do) of a gated call: gates 0, 1 and between.

    dominant: logits by which a dropped slot exceeds the others; empty: every gate is 0.
    """
    B, T, H, G, D, gate_heads, _ = shape
    rng = torch.Generator().manual_seed(3)
    sizes = [(B, T, H, D), (B, T, G, D), (B, T, G, D), (B, T, H, D)]
    q, k, v, do = (torch.randn(size, generator=rng, dtype=torch.float64) for size in sizes)
    gate = torch.rand(B, T, gate_heads, generator=rng, dtype=torch.float64)
    gate = torch.where(gate < 0.4, 0.0, torch.where(gate > 0.7, 1.0, gate))
    if empty:
        gate = torch.zeros_like(gate)
    if dominant:
        q[..., 0], k[..., 0] = 8.0, 0.0
        gate[:, 1], k[:, 1, :, 0] = 0.0, dominant * 8**0.5 / 8
    q, k, v, do = (x.to(dtype) for x in (q, k, v, do))
    return q, k, v, gate.to(torch.promote_types(dtype, torch.float32)), do


def check_gated(backend: str, shape, *, dtype=torch.float64, bound=1e-12, case=None, **settings) -> None:
    """kernels.gated_attention on that backend against the float64 oracle: o, dq, dk, dv, dgate."""
    from kvcat_nemo.kernels import gated_attention
    from kvcat_nemo.method.attention import gated_attention_reference

    bounds = None if shape[-1] is None else torch.tensor(shape[-1], dtype=torch.int32)
    settings["cu_seqlens"] = bounds
    _compare(gated_attention, gated_attention_reference, backend, shape, dtype, bound, case, settings)


def check_spans(backend: str, shape, *, dtype=torch.float64, bound=1e-12, case=None, **settings) -> None:
    """kernels.span_gated_attention on that backend against the float64 oracle, another cut in each window."""
    from kvcat_nemo.kernels import span_gated_attention
    from kvcat_nemo.method.attention import span_gated_attention_reference
    from kvcat_nemo.method.spans import Spans

    settings["spans"] = Spans.from_cuts([[5, 11], [9]][: shape[0]], shape[1], shape[-1])
    _compare(
        span_gated_attention, span_gated_attention_reference, backend, shape, dtype, bound, case, settings
    )


def _compare(ours, oracle, backend: str, shape, dtype, bound, case, settings) -> None:
    *tensors, do = gated_case(shape, dtype, **(case or {}))
    results = []
    for function, chosen, wide in ((ours, {"backend": backend}, False), (oracle, {}, True)):
        leaves = [(x.double() if wide else x).detach().clone().requires_grad_() for x in tensors]
        scale = 8**-0.5
        out = function(*leaves, scale=scale, **chosen, **settings)
        results.append([out.detach(), *torch.autograd.grad((out * do.to(out.dtype)).sum(), leaves)])
    for name, value, expected in zip(("o", "dq", "dk", "dv", "dgate"), *results, strict=True):
        error = (value.double() - expected).norm() / expected.norm().clamp(min=1.0)
        assert torch.isfinite(value).all() and error <= bound, (name, error)
    hidden = tensors[3] == 0
    assert hidden.any() and results[1][4][hidden].abs().max() > 0, "dropped slots' gates have a gradient"
