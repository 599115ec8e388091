"""PyTorch's fused attention for the CPU as a `FusedKernel`: float64, float32, bf16 and half, O(T) memory.

The operators take [B, H, T, D] with any strides (the last dimension contiguous) and grouped heads, but equal widths of
keys and values, whole windows and no sliding window. Packed documents are called one by one; a sliding window is a
batch of query blocks, each with the keys of its own and the preceding block, so T·window work.

Shapes: as in kernels/fused/interface.py; W size of a block, N their number.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.compat.torch_operators import CPU_BACKWARD, CPU_FORWARD
from kvcat_nemo.method.attention import document_positions

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MULTIPLE = 4
"""Widths are padded to a multiple of this: 68 ran as fast as 66 in float32 and faster in bf16."""
LONG_CALL = 768
"""Rows from which the operator takes its larger blocks (PyTorch 2.9)."""
SMALLEST_BLOCK = 64
"""Queries of a block of the sliding window, at least."""


class CpuKernel:
    """See FusedKernel for the contract."""

    name = "cpu"
    takes_key_bias = True

    def check(
        self, *, head_dim_qk, head_dim_v, dtype, device, window=None, packed=False, causal=True
    ) -> None:
        if torch.device(device).type != "cpu":
            raise ValueError(f"attention_backend=cpu: tensors are on {device}; use auto, te or flash there")
        if dtype not in DTYPES:
            raise ValueError(f"attention_backend=cpu: no {dtype}; use float32 or bfloat16")

    def widths(self, head_dim_qk: int, head_dim_v: int) -> tuple[int, int]:
        width = max(head_dim_qk, head_dim_v)
        width = -(-width // MULTIPLE) * MULTIPLE
        return width, width

    def forward(
        self, q_BTHD, k_BTGD, v_BTGE, *, scale, window=None, cu_seqlens=None, key_bias_BTG=None, causal=True
    ):
        if window is not None and window < q_BTHD.shape[1]:
            return self._window_forward(q_BTHD, k_BTGD, v_BTGE, scale, window, cu_seqlens)
        if cu_seqlens is None and not causal and _stacks(q_BTHD, k_BTGD):
            k, v = (x.transpose(1, 2) for x in (k_BTGD, v_BTGE))
            q = _stacked(q_BTHD, k.shape[1])
            mask = None if key_bias_BTG is None else key_bias_BTG.transpose(1, 2)[:, :, None]
            o, lse = CPU_FORWARD(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
            return _unstacked(o, q_BTHD), lse.unflatten(2, (-1, q_BTHD.shape[1])).flatten(1, 2), None
        if cu_seqlens is None:
            q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGE))
            mask = None if key_bias_BTG is None else _rows_alike(key_bias_BTG, q.shape[1])
            o, lse = CPU_FORWARD(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
            return o.transpose(1, 2), lse, None
        parts = [
            self.forward(
                *(x[:, a:b] for x in (q_BTHD, k_BTGD, v_BTGE)),
                scale=scale,
                key_bias_BTG=None if key_bias_BTG is None else key_bias_BTG[:, a:b],
            )
            for a, b in _documents(cu_seqlens)
        ]
        return torch.cat([o for o, _, _ in parts], 1), torch.cat([lse for _, lse, _ in parts], 2), None

    def backward(
        self,
        do_BTHE,
        q_BTHD,
        k_BTGD,
        v_BTGE,
        o_BTHE,
        lse_BHT,
        saved,
        *,
        scale,
        window=None,
        cu_seqlens=None,
        causal=True,
    ):
        if window is not None and window < q_BTHD.shape[1]:
            return self._window_backward(
                do_BTHE, q_BTHD, k_BTGD, v_BTGE, o_BTHE, lse_BHT, scale, window, cu_seqlens
            )
        if cu_seqlens is None and not causal and _stacks(q_BTHD, k_BTGD):
            k, v = (x.transpose(1, 2) for x in (k_BTGD, v_BTGE))
            do, q, o = (_stacked(x, k.shape[1]) for x in (do_BTHE, q_BTHD, o_BTHE))
            lse = lse_BHT.unflatten(1, (k.shape[1], -1)).flatten(2).contiguous()
            dq, dk, dv = CPU_BACKWARD(do, q, k, v, o, lse, 0.0, False, scale=scale)
            return _unstacked(dq, q_BTHD), dk.transpose(1, 2), dv.transpose(1, 2)
        if cu_seqlens is None:
            do, q, k, v, o = (x.transpose(1, 2) for x in (do_BTHE, q_BTHD, k_BTGD, v_BTGE, o_BTHE))
            grads = CPU_BACKWARD(do, q, k, v, o, lse_BHT, 0.0, causal, scale=scale)
            return tuple(x.transpose(1, 2) for x in grads)
        tensors = (do_BTHE, q_BTHD, k_BTGD, v_BTGE, o_BTHE)
        parts = [
            self.backward(*(x[:, a:b] for x in tensors), lse_BHT[..., a:b], None, scale=scale)
            for a, b in _documents(cu_seqlens)
        ]
        return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))

    def _window_forward(self, q, k, v, scale, window, cu_seqlens):
        B, T, H, _ = q.shape
        blocks = _Blocks(B, T, window, cu_seqlens, q)
        o, lse = CPU_FORWARD(
            blocks.queries(q), blocks.keys(k), blocks.keys(v), 0.0, False, attn_mask=blocks.mask, scale=scale
        )
        return blocks.flat(o), blocks.flat(lse[..., None])[..., 0].transpose(1, 2), None

    def _window_backward(self, do, q, k, v, o, lse, scale, window, cu_seqlens):
        B, T, H, _ = q.shape
        blocks = _Blocks(B, T, window, cu_seqlens, q)
        rows = blocks.queries(lse.transpose(1, 2)[..., None])[..., 0].contiguous()
        dq, dk, dv = CPU_BACKWARD(
            blocks.queries(do),
            blocks.queries(q),
            blocks.keys(k),
            blocks.keys(v),
            blocks.queries(o),
            rows,
            0.0,
            False,
            attn_mask=blocks.mask,
            scale=scale,
        )
        return blocks.flat(dq), blocks.sum_keys(dk), blocks.sum_keys(dv)


def _rows_alike(bias_BTG: Tensor, heads: int) -> Tensor:
    """[B, H, 1, T] mask: the operator takes a dimension of one as one that all share."""
    return bias_BTG.transpose(1, 2).repeat_interleave(heads // bias_BTG.shape[2], 1)[:, :, None]


def _stacks(q_BTHD: Tensor, k_BTGD: Tensor) -> bool:
    """Whether the rows of a KV head's query heads become rows of one head: the same function where every row sees every slot.

    The operator takes blocks of 256 rows in calls of at least LONG_CALL rows, and of 64 below, where AMX's products in 16
    bits take up to twice the time. float32 and longer calls lose a little by stacking.
    """
    T, repeats = q_BTHD.shape[1], q_BTHD.shape[2] // k_BTGD.shape[2]
    return q_BTHD.dtype.itemsize == 2 and T < LONG_CALL <= repeats * T


def _stacked(x_BTHD: Tensor, groups: int) -> Tensor:
    """[B, G, H/G · T, D]."""
    return x_BTHD.transpose(1, 2).unflatten(1, (groups, -1)).flatten(2, 3)


def _unstacked(x_BGRD: Tensor, like_BTHD: Tensor) -> Tensor:
    """Inverse of `_stacked`: [B, T, H, D]."""
    return x_BGRD.unflatten(2, (-1, like_BTHD.shape[1])).flatten(1, 2).transpose(1, 2)


def _documents(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


class _Blocks:
    """A window's tokens as N blocks of W ≥ window queries, each with 2W keys: the preceding block's and its own."""

    def __init__(self, B: int, T: int, window: int, cu_seqlens: Tensor | None, like: Tensor):
        self.B, self.T = B, T
        self.W = W = max(window, SMALLEST_BLOCK)
        self.N = N = -(-T // W)
        position, _ = document_positions(T, cu_seqlens, like.device)
        first = (torch.arange(T) - position).to(like.device)  # where each query's document begins
        first = F.pad(first, (0, N * W - T)).view(N, W, 1)
        i = torch.arange(N * W, device=like.device).view(N, W, 1)
        j = (torch.arange(2 * W) - W + W * torch.arange(N)[:, None])[:, None].to(like.device)
        hidden = (j > i) | (i - j >= window) | (j < first)
        mask = torch.zeros(N, W, 2 * W, dtype=like.dtype, device=like.device).masked_fill_(
            hidden, float("-inf")
        )
        self.mask = mask[None, :, None].expand(B, N, 1, W, 2 * W).reshape(B * N, 1, W, 2 * W)

    def queries(self, x_BTHD: Tensor) -> Tensor:
        """[B·N, H, W, D]."""
        x = F.pad(x_BTHD, (0, 0, 0, 0, 0, self.N * self.W - self.T))
        return x.reshape(self.B * self.N, self.W, *x.shape[2:]).transpose(1, 2)

    def keys(self, x_BTGD: Tensor) -> Tensor:
        """[B·N, G, 2W, D]; before the first token lie zeros."""
        x = F.pad(x_BTGD, (0, 0, 0, 0, self.W, self.N * self.W - self.T))
        x = x.unfold(1, 2 * self.W, self.W)  # [B, N, G, D, 2W]
        return x.permute(0, 1, 2, 4, 3).reshape(self.B * self.N, x.shape[2], 2 * self.W, x.shape[3])

    def flat(self, x_NHWD: Tensor) -> Tensor:
        """Inverse of `queries`: [B, T, H, D]."""
        x = x_NHWD.transpose(1, 2)
        return x.reshape(self.B, self.N * self.W, *x.shape[2:])[:, : self.T]

    def sum_keys(self, x_NGKD: Tensor) -> Tensor:
        """Transpose of `keys`: each token's sum over the two blocks that read it, [B, T, G, D]."""
        x = x_NGKD.transpose(1, 2).reshape(self.B, self.N, 2, self.W, x_NGKD.shape[1], -1)
        own, before = x[:, :, 1], x[:, 1:, 0]
        own[:, :-1] += before
        return own.reshape(self.B, self.N * self.W, *own.shape[3:])[:, : self.T]
