"""Causal linear attention in chunks: O(T) memory, equal to the quadratic form.

What earlier tokens mean to later ones is a state of R×(R+1) numbers, Σ kⱼ [vⱼ | 1]ᵀ. So a window may be cut into
segments, wherever they lie: each hands on its state, and takes that of everything before it.

Shapes: B batch, T tokens, N chunks, C tokens of a chunk, R width, S segments; a state is [R, R + 1].
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


def quadratic_linear_attention(
    q_BTR: Tensor, k_BTR: Tensor, v_BTR: Tensor, eps: float = 1e-6, position_BT: Tensor | None = None
) -> Tensor:
    """a_t = qₜᵀ Σ_{j≤t} kⱼ vⱼᵀ / (qₜᵀ Σ_{j≤t} kⱼ + ε), by the T×T matrix. The oracle of the chunked form.

    Args:
        q_BTR, k_BTR: non-negative features, [batch, tokens, width].
        v_BTR: values, [batch, tokens, width].
        position_BT: each token's place in its document, integers; the sums begin anew where one is 0. None: one document.

    Returns:
        [batch, tokens, width].
    """
    weight_BTT = torch.tril(q_BTR @ k_BTR.transpose(1, 2))
    if position_BT is not None:
        document = (position_BT == 0).cumsum(1)
        weight_BTT = weight_BTT * (document[:, :, None] == document[:, None, :])
    return weight_BTT @ v_BTR / (weight_BTT.sum(-1, keepdim=True) + eps)


def running_sum(x_BN: Tensor) -> Tensor:
    """x_0 + … + x_n for every n, [B, N, …]; also where PyTorch is told to be deterministic.

    CUDA's cumsum of floats has no deterministic form and raises then: a product with a triangle of ones does it. It adds
    zero times the later ones, so that one that is not finite reaches every sum.
    """
    if not (torch.are_deterministic_algorithms_enabled() and x_BN.is_floating_point()):
        return x_BN.cumsum(1)
    triangle = torch.ones(x_BN.shape[1], x_BN.shape[1], dtype=x_BN.dtype, device=x_BN.device).tril()
    return (triangle @ x_BN.flatten(2)).view(x_BN.shape)


class Segments(Protocol):
    """The tokens at hand are some segments of a window; others are elsewhere, on other processes for instance."""

    lengths: tuple[int, ...]
    """Tokens of each segment at hand, in order; may be 0."""

    def before(self, states_BSRR: Tensor) -> Tensor:
        """From the states that the segments at hand end with (of their last document alone), by themselves, the states
        that everything before each of them in the window hands to it, [B, S, R, R + 1]; differentiable in both directions.
        """


def chunked_linear_attention(
    q_BTR: Tensor,
    k_BTR: Tensor,
    v_BTR: Tensor,
    eps: float = 1e-6,
    chunk: int = 128,
    *,
    segments: Segments | None = None,
    position_BT: Tensor | None = None,
) -> Tensor:
    """The same by chunks: inside a chunk by a C×C matrix, before it by the running state Σ kⱼ vⱼᵀ.

    One state of R×(R+1) numbers is kept per chunk, so memory is T·(C + R²/C) numbers and not T².

    Args, returns: as `quadratic_linear_attention`; any T, the last chunk is padded with zeros.
        segments: how the tokens are parts of a longer window; None: they are the whole of it.
    """
    R = q_BTR.shape[-1]
    # A column of ones makes the normaliser qᵀz one more output column of the same sums.
    v1 = F.pad(v_BTR, (0, 1), value=1.0)
    lengths = (q_BTR.shape[1],) if segments is None else segments.lengths
    places = [None] * len(lengths) if position_BT is None else position_BT.split(lengths, 1)
    cut = [x.split(lengths, 1) for x in (q_BTR, k_BTR, v1)]
    pieces = [_Segment(*parts, chunk) for parts in zip(*cut, places, strict=True)]
    if segments is None:
        out = pieces[0].attend(None)
    else:
        before = segments.before(torch.stack([piece.state for piece in pieces], 1))
        out = torch.cat([piece.attend(before[:, i]) for i, piece in enumerate(pieces)], 1)
    return out[..., :R] / (out[..., R:] + eps)


class _Segment:
    """Consecutive tokens: the state they end with, and what they attend to once the state before them is known.

    Of a document that ends inside a chunk only the chunk's own later tokens see anything, so a chunk hands on the state
    of its last document alone, and that of earlier chunks where the document reaches back to them.
    """

    def __init__(self, q_BTR: Tensor, k_BTR: Tensor, v_BTR: Tensor, position_BT: Tensor | None, chunk: int):
        self.T = T = q_BTR.shape[1]
        pad = -T % chunk
        shape = (q_BTR.shape[0], -(-T // chunk), chunk)
        self.q, k, v = (F.pad(x, (0, 0, 0, pad)).view(*shape, x.shape[-1]) for x in (q_BTR, k_BTR, v_BTR))
        inside = torch.tril(self.q @ k.transpose(-1, -2))
        if position_BT is None:
            self.document = None
            state_BNRR = k.transpose(-1, -2) @ v
            sums = running_sum(state_BNRR)
            self.state = sums[:, -1] if T else v.new_zeros(shape[0], k.shape[-1], v.shape[-1])
            # Shifted by a chunk, not `cumsum − own`: subtraction would leave rounding of later tokens in earlier outputs.
            self.before = F.pad(sums[:, :-1], (0, 0, 0, 0, 1, 0))
        else:
            document = (position_BT == 0).cumsum(1)  # 0: the document that began before the segment
            last = document[:, -1:] if T else document.new_zeros(shape[0], 1)
            document = torch.cat([document, last.expand(-1, pad)], 1).view(shape)
            inside = inside * (document[..., :, None] == document[..., None, :])
            end_BN = document[..., -1]
            state_BNRR = (k * (document == end_BN[..., None])[..., None]).transpose(-1, -2) @ v
            # [B, N, N]: whether chunk m's state is still there when chunk n begins
            reaches = torch.tril(end_BN[:, :-1, None] == end_BN[:, None, :-1]).to(v.dtype)
            carried = torch.einsum("bnm,bmrs->bnrs", reaches, state_BNRR[:, :-1])
            self.before = F.pad(carried, (0, 0, 0, 0, 1, 0))
            self.state = ((end_BN == last)[..., None, None] * state_BNRR).sum(1)
            self.document = document
            begun = F.pad(end_BN[:, :-1], (1, 0), value=-1)
            self.continues = (document == begun[..., None])[..., None]
        self.inside = inside @ v

    def attend(self, before_BRR: Tensor | None) -> Tensor:
        """[B, T, R + 1]: sums over the earlier tokens, those before the segment included by their state."""
        if self.document is None:
            before = self.before if before_BRR is None else self.before + before_BRR[:, None]
            out = self.inside + self.q @ before
        else:
            out = self.inside + (self.q * self.continues) @ self.before
            if before_BRR is not None:
                out = out + (self.q * (self.document == 0)[..., None]) @ before_BRR[:, None]
        return out.flatten(1, 2)[:, : self.T]
