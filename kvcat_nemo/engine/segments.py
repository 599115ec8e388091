"""Which tokens of a window this rank's hidden states are, and the router's state handed from segment to segment.

Context parallelism gives a rank two chunks of every window (kernels/attention/context_parallel.py), sequence parallelism a slice of
those to each tensor-parallel rank. The ranks exchange the states that their segments end with, R×(R+1) numbers each,
and sum those of everything earlier: an exclusive prefix forward, an exclusive suffix backward. Hidden states stay where
they are.

Shapes: B windows, T tokens of this rank, S its segments, N those of all ranks, R width of the router.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Piece = tuple[int, int]
"""First token of a segment in the window, and the token after its last."""


@dataclass(frozen=True)
class TokenSegments:
    """See method.linear_attention.Segments. Made by `of_hidden_states`."""

    group: torch.distributed.ProcessGroup | None
    pieces: tuple[tuple[Piece, ...], ...]
    """Of every rank of the group: its segments in their order there, as many as any rank has; empty ones are (0, 0)."""
    rank: int
    position_BT: Tensor | None = None
    """Place of each of the whole window's tokens in its document; None: one document."""

    @classmethod
    def of_hidden_states(
        cls,
        tokens: int,
        tp_group,
        cp_group,
        both_group,
        sequence_parallel: bool,
        position_BT: Tensor | None = None,
    ) -> TokenSegments | None:
        """Segments of hidden states of `tokens` tokens; None when they are whole windows.

        Args:
            tp_group, cp_group, both_group: process groups of tensor, of context, and of both parallelisms.
            position_BT: of the whole window, as in the class.
        """
        tp = tp_group.size() if sequence_parallel and tp_group is not None else 1
        cp = cp_group.size() if cp_group is not None else 1
        if tp * cp == 1:
            return None
        if cp == 1:
            group = tp_group
        elif tp == 1:
            group = cp_group
        else:
            group = both_group
            expected = cp_group.rank() * tp + tp_group.rank()
            assert group.rank() == expected, "tensor-parallel ranks are expected to lie next to one another"
        pieces = pieces_of_ranks(tokens, tp, cp)
        most = max(map(len, pieces))
        return cls(group, tuple(p + ((0, 0),) * (most - len(p)) for p in pieces), group.rank(), position_BT)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in self.pieces[self.rank])

    def places(self, device=None) -> Tensor:
        """[T]: place in the window of each of this rank's tokens."""
        return torch.cat([torch.arange(start, end, device=device) for start, end in self.pieces[self.rank]])

    def own_of_first(self, tokens: int) -> list[int]:
        """Which of this rank's tokens are among the window's first."""
        places = [place for start, end in self.pieces[self.rank] for place in range(start, end)]
        return [i for i, place in enumerate(places) if place < tokens]

    def first(self, tokens: int, windows: int) -> TokenSegments:
        """The segments of the first tokens of the first windows alone."""
        cut = tuple(tuple((min(a, tokens), min(b, tokens)) for a, b in rank) for rank in self.pieces)
        position = None if self.position_BT is None else self.position_BT[:windows, :tokens]
        return replace(self, pieces=cut, position_BT=position)

    def own(self, x_BT: Tensor) -> Tensor:
        """This rank's tokens of whole windows."""
        return x_BT[:, self.places(x_BT.device)]

    def before(self, states_BSRR: Tensor) -> Tensor:
        """A collective call, in backward too."""
        return _Prefix.apply(states_BSRR, self._weights(states_BSRR), self.group, self.rank)

    def _weights(self, like: Tensor) -> Tensor:
        """[B or 1, N, N]: 1 where segment n is handed the state of segment m: m is earlier, and no document began between."""
        all_pieces = [piece for rank in self.pieces for piece in rank]
        start, end = _on_device(tuple(all_pieces), like.device)
        weights = (end[None, :] <= start[:, None]) & (end > start)[None, :] & (end > start)[:, None]
        if self.position_BT is None:
            return weights[None].to(like.dtype)
        # Documents that began before each place: none between m's last token and n's first where the numbers agree.
        begun = torch.nn.functional.pad((self.position_BT == 0).cumsum(1), (1, 0))
        return (weights & (begun[:, start][:, :, None] == begun[:, end][:, None, :])).to(like.dtype)


@functools.lru_cache(maxsize=64)
def _on_device(pieces: tuple[Piece, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Starts and ends of segments; kept, since copying them to a GPU makes the host wait for it."""
    start, end = torch.tensor(pieces, device=device).T
    return start, end


def pieces_of_ranks(tokens: int, tp: int, cp: int) -> list[tuple[Piece, ...]]:
    """Each rank's segments, context-parallel rank by rank, of its tensor-parallel ranks one by one."""
    chunk = tokens * tp // 2
    out = []
    for c in range(cp):
        runs = [(0, tokens * tp)] if cp == 1 else [(i * chunk, (i + 1) * chunk) for i in (c, 2 * cp - 1 - c)]
        for t in range(tp):
            first, last, passed, pieces = t * tokens, (t + 1) * tokens, 0, []
            for start, end in runs:
                a, b = max(first, passed), min(last, passed + end - start)
                if a < b:
                    pieces.append((start + a - passed, start + b - passed))
                passed += end - start
            out.append(tuple(pieces))
    return out


class _Prefix(torch.autograd.Function):
    """states [B, S, …] of every rank → Σ_m weight[n, m]·state_m for this rank's segments n; backward the transpose."""

    @staticmethod
    def forward(ctx, states: Tensor, weights_BNN: Tensor, group, rank: int) -> Tensor:
        segments = states.shape[1]
        own = slice(rank * segments, (rank + 1) * segments)
        ctx.save_for_backward(weights_BNN[:, :, own])
        ctx.group = group
        return _weighted(weights_BNN[:, own], _all(states, group))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (given,) = ctx.saved_tensors  # [B, N, S]: to whom this rank's segments are handed
        return _weighted(given.transpose(1, 2), _all(grad, ctx.group)), None, None, None


def _all(x_BS: Tensor, group) -> Tensor:
    """[B, S, …] of every rank → [B, N, …]."""
    x = x_BS.detach().contiguous()
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    torch.distributed.all_gather_into_tensor(out, x, group=group)
    return out.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(1, 2)


def _weighted(weights_BSN: Tensor, x_BN: Tensor) -> Tensor:
    out = weights_BSN.expand(x_BN.shape[0], -1, -1) @ x_BN.flatten(2)
    return out.unflatten(2, x_BN.shape[2:])
