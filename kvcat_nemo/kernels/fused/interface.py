"""What a fused attention kernel must offer so that gated attention can be built on it.

A kernel knows nothing of gates: kernels/attention/gated.py turns a gated call into plain ones (see there). It relies on two
things that every flash-style kernel does and that its documentation seldom says:

- `backward` recomputes the weights as P_ij = exp(scale·⟨q_i, k_j⟩ − lse_i) with the lse that it is *given*;
- it takes δ_i = Σ_c do_ic·o_ic from the o that it is *given*, and dS_ij = P_ij·(⟨do_i, v_j⟩ − δ_i).

Neither o nor lse is the forward's in general: weights may exceed one (by exp(60) at most) and o may be zero.

Shapes: B batch, T tokens, H query heads, G KV heads, D width of queries and keys, E width of values.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class FusedKernel(Protocol):
    """A fused forward and backward of plain attention, causal unless said otherwise."""

    name: str
    """As in BACKENDS and in the configuration."""
    takes_key_bias: bool
    """Whether `forward` also knows key_bias_BTG, a number added to each slot's scaled logits, for equal D and E of any
    width; gated attention then needs no more columns there."""

    def check(
        self,
        *,
        head_dim_qk: int,
        head_dim_v: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
        packed: bool = False,
        causal: bool = True,
    ) -> None:
        """Raise a ValueError that names what does not fit: package, device, dtype, widths, window, packing.

        Args:
            head_dim_qk, head_dim_v: widths as they would be handed over, i.e. after `widths`.
            window, causal: as in `forward`; packed: whether cu_seqlens would be given.
        """

    def widths(self, head_dim_qk: int, head_dim_v: int) -> tuple[int, int]:
        """The narrowest (D, E) at least this wide that the kernel takes; the caller pads with zeros.

        Raises:
            ValueError: when there is none.
        """

    def forward(
        self,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGE: Tensor,
        *,
        scale: float,
        window: int | None = None,
        cu_seqlens: Tensor | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Any]:
        """Causal attention.

        Args:
            q_BTHD, k_BTGD, v_BTGE: one dtype; G divides H and head h reads KV head h // (H / G). The last dimension is
                contiguous, the others need not be.
            scale: softmax scale; never derived from D, which may be padded.
            window: w: a query sees its last w slots, its own included; None: all earlier ones.
            cu_seqlens: [n + 1] int32 on the tensors' device, the documents' boundaries 0 … T; B is 1 then. No
                attention across them.
            causal: False: every query sees every slot, and k and v may have another number of tokens than q; window and
                cu_seqlens are None then.

        Returns:
            o_BTHE in the inputs' dtype, lse_BHT (natural logarithm of the scaled logits' sum of exponentials; float32
            or wider), and whatever `backward` wants kept.
        """

    def backward(
        self,
        do_BTHE: Tensor,
        q_BTHD: Tensor,
        k_BTGD: Tensor,
        v_BTGE: Tensor,
        o_BTHE: Tensor,
        lse_BHT: Tensor,
        saved: Any,
        *,
        scale: float,
        window: int | None = None,
        cu_seqlens: Tensor | None = None,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq_BTHD, dk_BTGD, dv_BTGE in the inputs' dtype, by the two formulas of the module's docstring.

        Any of q, k, v, o and lse may differ from the forward's; `saved` is the forward's, and may be used for what does not
        depend on them alone (an empty random state, say).
        """
