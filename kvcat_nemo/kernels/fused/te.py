"""Transformer Engine's fused attention (cuDNN) as a FusedKernel, with its own choice of backend.

`get_attention_backend` chooses, with the environment's NVTE_* variables and all its rules; where it says FlashAttention
(Ampere, mostly), kernels/fused/flash.py makes the call. Written against `cpp_extensions.fused_attn.fused_attn_fwd` and
`fused_attn_bwd` of Transformer Engine 2.9 to 2.20; arguments that a version does not know are left out.

What gated attention relies on, and where the sources do it (transformer_engine/common/fused_attn/
fused_attn_f16_arbitrary_seqlen.cu builds cuDNN's graphs; cudnn-frontend's include/cudnn_frontend/node/
scaled_dot_product_flash_attention.h says what a graph means):
- the first auxiliary tensor is the natural log-sum-exp, float32: cuDNN's backward subtracts it from the scaled scores
  ("sub_s_m") before its exponential, and Transformer Engine's ring attention merges it by log1p(exp(·)). Shape
  [B, H, T, 1]; packed rows [T, H, 1] from cuDNN 9.6 on, up to 2.10 with more rows after them (max(1024, next power of
  two), from 32k on multiples of 32k); else padded to the longest document (sm120);
- backward takes lse and o from its arguments and forms δ = Σ_c do·o over all columns ("mul_dO_O", "reduce_dO_o");
- the C++ layer reads tensors by the layout's name and ignores strides: everything handed over is contiguous;
- window (left, right): cuDNN's left bound is left + 1, so w slots are (w − 1, 0);
- packed documents need cu_seqlens_*_padded too (the offsets), with the mask padding_causal.

FP8 attention, softcap and dropout have no place in the contract; engine/config_checks.py refuses them.

Shapes: B batch, T tokens, H query heads, G KV heads, D width of queries and keys, E width of values, n documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.compat.te_package import call, engine, parameters
from kvcat_nemo.kernels.fused.cuda_kernel import CudaKernel
from kvcat_nemo.kernels.fused.determinism import deterministic
from kvcat_nemo.kernels.fused.flash import left_of, longest
from kvcat_nemo.kernels.fused.te_selection import Choice, Selection


class TransformerEngineKernel(CudaKernel):
    """See FusedKernel for the contract."""

    name, needs = "te", "Transformer Engine"

    def __init__(self):
        self.selection = Selection()
        self.last: Choice | None = None
        """What the last forward ran on."""

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
        self.check_window(window)
        packing = {"documents": 2, "longest": 2048} if packed else {}
        choice = self.selection.choose(
            head_dim_qk, head_dim_v, dtype=dtype, window=window, causal=causal, **packing
        )
        self.selection.require(choice, head_dim_qk, head_dim_v, packed)
        if choice.kernel is not None:
            choice.kernel.check(
                head_dim_qk=head_dim_qk,
                head_dim_v=head_dim_v,
                dtype=dtype,
                device=device,
                window=window,
                packed=packed,
                causal=causal,
            )

    def widths(self, head_dim_qk: int, head_dim_v: int) -> tuple[int, int]:
        """The narrowest widths that cuDNN takes on this device, else that FlashAttention takes; see Selection."""
        return self.selection.widths(head_dim_qk, head_dim_v)

    def forward(
        self, q_BTHD, k_BTGD, v_BTGE, *, scale, window=None, cu_seqlens=None, causal=True
    ) -> tuple[Tensor, Tensor, Any]:
        """See FusedKernel.forward."""
        B, T, H, D = q_BTHD.shape
        G, E = v_BTGE.shape[2:]
        length = None if cu_seqlens is None else longest(cu_seqlens)
        packing = {} if length is None else {"documents": cu_seqlens.numel() - 1, "longest": length}
        choice = self.selection.choose(
            D,
            E,
            dtype=q_BTHD.dtype,
            batch=B,
            tokens=T,
            slots=k_BTGD.shape[1],
            heads=H,
            groups=G,
            window=window,
            causal=causal,
            scale=scale,
            **packing,
        )
        self.selection.require(choice, D, E, bool(packing))
        self.last = choice
        if choice.kernel is not None:
            o, lse, saved = choice.kernel.forward(
                q_BTHD, k_BTGD, v_BTGE, scale=scale, window=window, cu_seqlens=cu_seqlens, causal=causal
            )
            return o, lse, (choice, saved)
        fused_attn, _, _ = engine()
        shared, optional, cu_seqlens = _arguments(
            q_BTHD, k_BTGD.shape[1], choice, scale, window, cu_seqlens, length, causal
        )
        q, k, v = (_laid_out(x, length) for x in (q_BTHD, k_BTGD, v_BTGE))
        o, aux, *_ = call(
            fused_attn.fused_attn_fwd, {"is_training": True, "q": q, "k": k, "v": v} | shared, optional
        )
        stats, *rest = aux
        lse = _rows_from_stats(stats, cu_seqlens, length, T)
        return (o if length is None else o[None]), lse, (choice, (length, stats.shape, stats.dtype, rest))

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
        choice, kept = saved
        if choice.kernel is not None:
            return choice.kernel.backward(
                do_BTHE, q_BTHD, k_BTGD, v_BTGE, o_BTHE, lse_BHT, kept, scale=scale, window=window, cu_seqlens=cu_seqlens,
                causal=causal,
            )  # fmt: skip
        length, shape, dtype, rest = kept
        fused_attn, _, constants = engine()
        shared, optional, cu_seqlens = _arguments(
            q_BTHD, k_BTGD.shape[1], choice, scale, window, cu_seqlens, length, causal
        )
        do, q, k, v, o = (_laid_out(x, length) for x in (do_BTHE, q_BTHD, k_BTGD, v_BTGE, o_BTHE))
        stats = _stats_from_rows(lse_BHT.to(dtype), shape, cu_seqlens, length)
        layout = shared["qkv_layout"]
        optional |= {
            "do_format": optional["o_format"],
            "dqkv_layout": layout,
        }
        if "dqkv_dtype" in parameters(fused_attn.fused_attn_bwd):  # up to 2.14; later ones use fake_dtype
            optional["dqkv_dtype"] = constants.TE_DType[q.dtype]
        tensors = {"q": q, "k": k, "v": v, "o": o, "d_o": do, "aux_ctx_tensors": [stats, *rest]}
        grads = call(
            fused_attn.fused_attn_bwd, tensors | shared | {"deterministic": deterministic()}, optional
        )
        dq, dk, dv = grads[:3]
        return (dq, dk, dv) if length is None else (dq[None], dk[None], dv[None])


def _laid_out(x_BTHD: Tensor, length: int | None) -> Tensor:
    """bshd, or thd when packed; contiguous, since the extension does not look at strides."""
    return (x_BTHD if length is None else x_BTHD[0]).contiguous()


def _arguments(q_BTHD: Tensor, slots: int, choice: Choice, scale, window, cu_seqlens, length, causal: bool):
    """What both directions take: (arguments every version knows, those that came later, the queries' cu_seqlens).

    slots: tokens of k and v, those of q where attention is causal.
    """
    B, T = q_BTHD.shape[:2]
    packed = length is not None
    cu_seqlens_kv = cu_seqlens
    if not packed:
        cu_seqlens, cu_seqlens_kv = (
            torch.arange(0, (B + 1) * n, n, dtype=torch.int32, device=q_BTHD.device) for n in (T, slots)
        )
    mask = ("padding_causal" if packed else "causal") if causal else "no_mask"
    shared = {
        "max_seqlen_q": length if packed else T,
        "max_seqlen_kv": length if packed else slots,
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens_kv,
        "cu_seqlens_q_padded": cu_seqlens if packed else None,
        "cu_seqlens_kv_padded": cu_seqlens if packed else None,
        "fake_dtype": q_BTHD.dtype,
        "fused_attention_backend": _sub_backend(choice.backend),
        "attn_scale": scale,
        "dropout": 0.0,
        "qkv_layout": "thd_thd_thd" if packed else "bshd_bshd_bshd",
        "attn_bias_type": "no_bias",
        "attn_mask_type": mask,
        "window_size": (left_of(window), 0 if causal else -1),
    }
    later = {
        "o_format": "thd" if packed else "bshd",
        "softmax_type": "vanilla",
        "bottom_right_diagonal": False,
    }
    return shared, later, cu_seqlens


def _sub_backend(value: int):
    """An int goes everywhere from 2.20 on; before that the functions take a member of their enum."""
    fused_attn, _, _ = engine()
    known = fused_attn.FusedAttnBackend
    if isinstance(known, dict):
        return next(member for member in known.values() if int(member) == value)
    return known(value)


def _places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Document and place within it of every token of a packed stream."""
    at = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long(), at, right=True)
    return document, at - cu_seqlens.long()[document]


def _rows_from_stats(stats: Tensor, cu_seqlens: Tensor, length: int | None, tokens: int) -> Tensor:
    """lse_BHT of so many tokens from cuDNN's softmax statistics."""
    if length is None:
        return stats[..., 0]  # [B, H, T, 1]
    if stats.dim() == 3:
        return stats[:tokens, :, 0].T[None]  # [T or more, H, 1]
    document, place = _places(cu_seqlens, tokens)  # [n, H, longest, 1]
    return stats[document, :, place, 0].T[None]


def _stats_from_rows(lse_BHT: Tensor, shape: torch.Size, cu_seqlens: Tensor, length: int | None) -> Tensor:
    """The statistics that backward wants, in forward's shape, from any lse_BHT."""
    if length is None:
        return lse_BHT[..., None].contiguous()
    if len(shape) == 3:
        return F.pad(lse_BHT[0].T[..., None], (0, 0, 0, 0, 0, shape[0] - lse_BHT.shape[-1])).contiguous()
    stats = lse_BHT.new_zeros(shape)
    document, place = _places(cu_seqlens, lse_BHT.shape[-1])
    stats[document, :, place, 0] = lse_BHT[0].T
    return stats
