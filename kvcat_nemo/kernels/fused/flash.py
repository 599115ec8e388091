"""flash-attn's forward and backward as a FusedKernel: FlashAttention-2 (Ampere on) and FlashAttention-3 (Hopper).

The functions called are those below flash-attn's autograd layer; signatures as of flash-attn 2.7 to 2.8
(`flash_attn/flash_attn_interface.py`) and flash-attn-3 3.0.0 (`hopper/flash_attn_interface.py`). The betas of flash-attn-3
call themselves 3.0.0.b1 whatever their signatures: what a function takes is looked at (kernels/compat/flash_packages.py), and where
it does not fit FlashAttention-2 serves.

What gated attention relies on, and where the sources do it:
- backward recomputes P from the lse it is given: `flash_bwd_kernel.h` scales the scores by exp2 against `lse`, and
  `hopper/mainloop_bwd_sm90_tma_gmma_ws.hpp` alike;
- δ = Σ_c do·o over every column of the o it is given: `dot_do_o` in `csrc/flash_attn/src/flash_bwd_preprocess_kernel.h`,
  the same sum in `hopper/flash_bwd_preprocess_kernel.h`;
- P and dS are rounded to the inputs' dtype before their products, so that a weight of exp(60) needs bf16: fp16 ends
  at 65504 and is refused.

FlashAttention-2 knows one width for q, k and v, a multiple of 8 up to 256. Inside, it rounds up to a multiple of 32
(of 64 above 128); narrower tensors only save memory. Sliding windows are (left, right) = (w − 1, 0).

Shapes: B batch, T tokens, H query heads, G KV heads, D width of queries and keys, E width of values.
"""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.compat.flash_packages import available, function, functions
from kvcat_nemo.kernels.compat.torch_operators import version_of
from kvcat_nemo.kernels.fused.cuda_kernel import FlashWidths, one_width
from kvcat_nemo.kernels.fused.determinism import deterministic


def left_of(window: int | None) -> int:
    """Slots to the left of its own that a query sees; −1: all."""
    return -1 if window is None else window - 1


def longest(cu_seqlens: Tensor) -> int:
    """Tokens of the longest document. Waits for the device once for each batch, not in every layer.

    The boundaries of the last batches are kept, so that nothing else can come to lie at their address; a change in place
    raises the version.
    """
    for known, version, length in _lengths:
        if (
            known.data_ptr() == cu_seqlens.data_ptr()
            and known.shape == cu_seqlens.shape
            and version == version_of(cu_seqlens)
        ):
            return length
    length = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    _lengths.append((cu_seqlens, version_of(cu_seqlens), length))
    return length


_lengths: collections.deque = collections.deque(maxlen=16)
"""Boundaries, their version and `longest` of them; a pipeline has several micro-batches under way."""


class FlashKernel(FlashWidths):
    """FlashAttention-2, or -3 where it is installed and the device is a Hopper; see FusedKernel for the contract."""

    name, needs = "flash", "flash-attn"

    def __init__(self, generation: int | None = None):
        """generation: 2 or 3; None chooses by device and by what is installed."""
        self.generation = generation

    def _generation(self, device: torch.device) -> int:
        if self.generation is not None:
            return self.generation
        hopper = torch.cuda.get_device_capability(device) == (9, 0)
        return 3 if hopper and available(3) else 2

    def check(
        self,
        *,
        head_dim_qk: int,
        head_dim_v: int,
        dtype,
        device,
        window: int | None = None,
        packed: bool = False,
        causal: bool = True,
    ) -> None:
        """See FusedKernel.check."""
        device = torch.device(device)
        self.check_tensors(device, dtype)
        self.check_capability(device)
        functions(self._generation(device))
        self.check_widths(head_dim_qk, head_dim_v)
        self.check_window(window)

    def forward(
        self, q_BTHD, k_BTGD, v_BTGE, *, scale, window=None, cu_seqlens=None, causal=True
    ) -> tuple[Tensor, Tensor, Any]:
        """See FusedKernel.forward."""
        E = v_BTGE.shape[-1]
        generation = self._generation(q_BTHD.device)
        q, k, v = one_width(q_BTHD, k_BTGD, v_BTGE)
        length = None if cu_seqlens is None else longest(cu_seqlens)
        call = _settings(scale, window, causal)
        if generation == 2:
            call |= {"dropout_p": 0.0, "causal": causal, "alibi_slopes": None, "return_softmax": False}
        else:
            call["causal"] = causal
        attend = function(generation, "forward", length is not None)
        if length is None:
            o, lse_BHT, *rest = attend(q, k, v, **call)
        else:
            o, lse_HT, *rest = attend(q[0], k[0], v[0], **call, **_packing(cu_seqlens, length))
            o, lse_BHT = o[None], lse_HT[None]
        return o[..., :E], lse_BHT, (length, rest[-1] if generation == 2 else None)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See FusedKernel.backward."""
        D, E = q_BTHD.shape[-1], v_BTGE.shape[-1]
        generation = self._generation(q_BTHD.device)
        q, k, v = one_width(q_BTHD, k_BTGD, v_BTGE)
        do, o = (F.pad(x, (0, v.shape[-1] - E)) for x in (do_BTHE, o_BTHE))
        length, random_state = saved
        tensors = [do, q, k, v, o]
        lse = lse_BHT
        call = _settings(scale, window, causal)
        call["deterministic"] = deterministic()
        if length is not None:
            tensors, lse = [x[0] for x in tensors], lse_BHT[0]
            call |= _packing(cu_seqlens, length)
        # The kernels index these by shape alone.
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[1:4]]
        call |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        if generation == 2:
            call |= {"dropout_p": 0.0, "causal": causal, "alibi_slopes": None, "rng_state": random_state}
        else:
            call["is_causal"] = causal
        function(generation, "backward", length is not None)(*tensors, lse.contiguous(), **call)
        if length is not None:
            grads = [x[None] for x in grads]
        dq, dk, dv = grads
        return dq[..., :D], dk[..., :D], dv[..., :E]


def _settings(scale: float, window: int | None, causal: bool) -> dict[str, Any]:
    return {
        "softmax_scale": scale,
        "window_size_left": left_of(window),
        "window_size_right": 0 if causal else -1,
        "softcap": 0.0,
    }


def _packing(cu_seqlens: Tensor, length: int) -> dict[str, Any]:
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": length,
        "max_seqlen_k": length,
    }
