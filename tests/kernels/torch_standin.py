"""PyTorch's CUDA flash-attention operators without a GPU: the real operators' schemas, with a dense float64 kernel for the CPU.

`installed()` registers CPU kernels for aten::_flash_attention_forward and aten::_flash_attention_backward, so that the
dispatcher checks every argument's place, name and type against the schema of the PyTorch that runs. The kernels check what
flash_api.cpp checks and read memory as it does: log-sum-exps by shape alone, documents from the boundaries.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from tests.kernels import softmax_standin

calls: list[dict] = []
"""Every call since `calls.clear()`: operator, whether packed, widths, window, determinism."""

RANDOM_STATES = {
    "a pair and an unused tensor": (torch.tensor([7, 0]).to(torch.uint64), torch.tensor(9).to(torch.uint64)),
    "a seed and an offset": (torch.tensor(7), torch.tensor(9)),
}
"""The two forms that the random state has had (the second up to 2.6, and on ROCm)."""
random_state = [*RANDOM_STATES.values()][0]


def _deterministic() -> bool:
    """As attention_backward.cu has it."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def _pieces(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, left, right):
    """Where each sequence lies; checks what flash_api.cpp checks."""
    assert dropout == 0.0
    assert (right == 0 and left >= -1) if causal else (left, right) == (-1, -1)
    assert q.dtype == k.dtype == v.dtype and k.shape == v.shape and q.shape[-1] == k.shape[-1]
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[-2] % k.shape[-2] == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert (cu_q is None) == (cu_k is None) and q.dim() == (4 if cu_q is None else 3)
    if cu_q is None:
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        assert not causal or q.shape[1] == k.shape[1]
        return list(range(len(q)))
    assert causal and cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    assert cu_q.is_contiguous() and max_q == max_k == int((cu_q[1:] - cu_q[:-1]).max())
    return softmax_standin.documents(cu_q)


def _forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, window_size_left=None,
    window_size_right=None, **more,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not debug and not any(x is not None for x in more.values())
    pieces = _pieces(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, window_size_left, window_size_right)
    wide = torch.promote_types(q.dtype, torch.float32)
    o, H = torch.empty_like(q), q.shape[-2]
    lse = torch.empty((len(q), H, q.shape[1]) if cu_q is None else (H, len(q)), dtype=wide)
    for at in pieces:
        out, rows = softmax_standin.forward(q[at], k[at], v[at], scale, window_size_left, causal)
        o[at] = out.to(o.dtype)
        lse[at if cu_q is None else (slice(None), at)] = rows.to(wide)
    calls.append(
        {"pass": "forward", "packed": cu_q is not None, "width": q.shape[-1], "left": window_size_left}
    )
    return o, lse, *(x.clone() for x in random_state), q.new_empty(0)


def _backward(
    do, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, dropout, causal, first, second, *, scale=None, window_size_left=None,
    window_size_right=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    pieces = _pieces(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, window_size_left, window_size_right)
    assert torch.equal(first, random_state[0]) and torch.equal(second, random_state[1]), (
        "as forward gave them"
    )
    assert o.shape == do.shape == q.shape and o.dtype == do.dtype == q.dtype
    assert do.is_contiguous() and o.is_contiguous()
    lse = softmax_standin.dense_view(lse)
    assert lse.dtype == torch.promote_types(q.dtype, torch.float32)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for at in pieces:
        rows = lse[at] if cu_q is None else lse[:, at]
        values = softmax_standin.backward(
            do[at], q[at], k[at], v[at], o[at], rows, scale, window_size_left, causal
        )
        for grad, value in zip(grads, values, strict=True):
            grad[at] = value.to(grad.dtype)
    calls.append({"pass": "backward", "packed": cu_q is not None, "deterministic": _deterministic()})
    return tuple(grads)


@contextlib.contextmanager
def installed():
    """The CPU kernels."""
    calls.clear()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _forward, "CPU")
        library.impl("_flash_attention_backward", _backward, "CPU")
        yield
