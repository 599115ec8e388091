"""Windows whose tokens lie on several processes (context parallelism): moving keys, values and gates between them.

Of a window in 2·n chunks, rank r of n holds chunks r and 2n − 1 − r, in this order: Megatron's load-balanced order, by
which every rank has the same share of the causal triangle.

Shapes: B windows, T tokens of a whole window, T/n of a rank, S = T/2n of a chunk; further dimensions as they come.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp


@dataclass(frozen=True)
class WindowSplit:
    """This rank's place in the split. Its methods are collective calls, but for `own`, `place`, `runs` and `positions`."""

    group: torch.distributed.ProcessGroup | None
    ranks: int
    rank: int

    @classmethod
    def over(cls, group) -> WindowSplit | None:
        """The split over a process group; None where there is nothing to split."""
        if group is None or group.size() == 1:
            return None
        return cls(group, group.size(), group.rank())

    @property
    def chunks(self) -> tuple[int, int]:
        return self.rank, 2 * self.ranks - 1 - self.rank

    def runs(self, tokens: int) -> list[tuple[int, int, int]]:
        """(first of the rank's own tokens, its place in the window, length), of each of the two chunks.

        Args:
            tokens: T/n.

        Raises:
            ValueError: when they are no two chunks.
        """
        if tokens % 2:
            raise ValueError(
                f"{tokens} tokens on each of {self.ranks} context-parallel ranks are no two chunks: give the window a "
                f"multiple of {2 * self.ranks} tokens"
            )
        chunk = tokens // 2
        return [(i * chunk, c * chunk, chunk) for i, c in enumerate(self.chunks)]

    def positions(self, tokens: int, device=None) -> Tensor:
        """Place in the window of each of this rank's T/n tokens."""
        return torch.cat([torch.arange(at, at + n, device=device) for _, at, n in self.runs(tokens)])

    def whole(self, x: Tensor) -> Tensor:
        """[B, T, …] in the window's order, from every rank's [B, T/n, …]."""
        self.runs(x.shape[1])
        gathered = x.new_empty(self.ranks * x.shape[0], *x.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, x.detach().contiguous(), group=self.group)
        early, late = gathered.unflatten(0, (self.ranks, -1)).unflatten(2, (2, -1)).unbind(2)  # [n, B, S, …]
        return torch.cat([early, late.flip(0)]).movedim(0, 1).flatten(1, 2)

    def own(self, x: Tensor) -> Tensor:
        """This rank's [B, T/n, …] of a whole [B, T, …]."""
        return x.unflatten(1, (2 * self.ranks, -1))[:, list(self.chunks)].flatten(1, 2)

    def place(self, x: Tensor) -> Tensor:
        """A whole [B, T, …] of zeros but for this rank's [B, T/n, …]."""
        out = x.new_zeros(x.shape[0], 2 * self.ranks, x.shape[1] // 2, *x.shape[2:])
        out[:, list(self.chunks)] = x.unflatten(1, (2, -1))
        return out.flatten(1, 2)

    def sum_to_owner(self, x: Tensor) -> Tensor:
        """This rank's [B, T/n, …] of the sum of all ranks' whole [B, T, …]; summed in at least float32, in x's dtype."""
        chunks = x.unflatten(1, (2 * self.ranks, -1)).movedim(1, 0)  # [2n, B, S, …]
        sent = torch.stack([chunks[: self.ranks], chunks[self.ranks :].flip(0)], 1).contiguous()
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=self.group)
        wide = torch.promote_types(x.dtype, torch.float32)
        return received.sum(0, dtype=wide).to(x.dtype).movedim(0, 1).flatten(1, 2)

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of all ranks' x, elementwise."""
        x = x.contiguous().clone()
        torch.distributed.all_reduce(x, op=ReduceOp.MAX, group=self.group)
        return x

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        torch.distributed.all_reduce(x, group=self.group)
        return x


class Whole(torch.autograd.Function):
    """`WindowSplit.whole` with its gradient: each rank's, summed at the owner of the token."""

    @staticmethod
    def forward(ctx, x: Tensor, split: WindowSplit) -> Tensor:
        ctx.split = split
        return split.whole(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.split.sum_to_owner(grad), None
