"""One sweep of kernels.losses.token_loss over the chunks of a batch: metrics, and the gradients of given token weights.

Shapes: T tokens, B windows, 2B the paired batch [dense | masked], M width, V this rank's part of the (padded)
vocabulary, N rows of a chunk or block of each pass: tokens × windows. K metrics, or of weights those of CE and KL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from kvcat_nemo.kernels.losses.row_losses import row_losses

TOKEN_METRICS = ("ce_dense", "kl", "ce_masked", "top1")
"""Rows of a paired batch's token metrics; a dense-only batch has the first alone."""

_BLOCK_BYTES = 4 << 20
"""Logits that one process transforms at a time on a CPU, which bounds the scratch memory."""


@dataclass(frozen=True)
class Vocabulary:
    """This rank's rows of the output weight, and sums over the rows of all ranks."""

    group: object | None
    sequence_parallel: bool
    first: int
    """The first row's token id."""
    real: int
    """Rows of true tokens; those after them are padding and never multiplied."""

    @classmethod
    def of(cls, group, sequence_parallel: bool, rows: int, vocab_size: int) -> Vocabulary:
        split = group is not None and group.size() > 1
        first = group.rank() * rows if split else 0
        real = min(max(vocab_size - first, 0), rows)
        return cls(group if split else None, sequence_parallel and split, first, real)

    def reduce(self, x: Tensor, op=ReduceOp.SUM) -> Tensor:
        if self.group is not None:
            torch.distributed.all_reduce(x, op=op, group=self.group)
        return x

    def whole(self, hidden: Tensor) -> Tensor:
        """[T, …] on every rank from each rank's [T/ranks, …]."""
        if not self.sequence_parallel:
            return hidden
        out = hidden.new_empty(self.group.size() * hidden.shape[0], *hidden.shape[1:])
        torch.distributed.all_gather_into_tensor(out, hidden.contiguous(), group=self.group)
        return out

    def own(self, grad: Tensor) -> Tensor:
        """What a rank passes on of the gradient of `whole` hidden states, summed over the ranks' vocabularies."""
        if not self.sequence_parallel:
            return self.reduce(grad)
        out = grad.new_empty(grad.shape[0] // self.group.size(), *grad.shape[1:])
        torch.distributed.reduce_scatter_tensor(out, grad, group=self.group)
        return out


@dataclass(frozen=True)
class Settings:
    vocabulary: Vocabulary
    paired: bool
    temperature: float
    forward_share: float
    """λ of λ·KL(dense ‖ masked) + (1 − λ)·KL(masked ‖ dense)."""
    memory: int
    """Bytes for the logits of a chunk."""
    triton: bool = False
    """Whether kernels/losses/row_losses_triton.py turns logits into metrics and gradients, else kernels/losses/row_losses.py."""

    def rows(self, weight: Tensor, wide: torch.dtype) -> tuple[int, int]:
        """Rows of each pass in a chunk, and how many of them are transformed at a time."""
        columns = len(weight)  # not the true ones alone: every rank must come to the same number of chunks
        if self.triton:
            chunk = max(self.memory // (columns * (1 + self.paired) * weight.dtype.itemsize), 1)
            return chunk, chunk
        blocks = self.vocabulary.group is None and weight.device.type == "cpu"
        scratch = (0 if blocks else 1 + (self.temperature != 1)) if self.paired else 0
        if scratch and self.forward_share != 1:
            scratch = 4
        narrow = weight.dtype.itemsize if weight.dtype != wide else 0
        bytes_per_row = columns * ((1 + self.paired) * (wide.itemsize + narrow) + scratch * wide.itemsize)
        chunk = max(self.memory // bytes_per_row, 1)
        return chunk, max(_BLOCK_BYTES // (columns * wide.itemsize), 1) if blocks else chunk


def sweep(hidden, weight, labels_TB, weights_KTB, s: Settings, needs: tuple[bool, bool]):
    """Metrics [K, T, B], and the gradients of Σ weights·(CE, KL) to this rank's hidden states and output weight.

    Gradients are None when `weights_KTB` is, or where they are not needed. The weight's is in at least float32.
    """
    voc = s.vocabulary
    own_dtype, wide = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
    h = voc.whole(hidden)
    T, width, M = h.shape
    passes = 1 + s.paired
    B = width // passes
    rows = weight[: max(voc.real, 1)]
    chunk, block = s.rows(weight, wide)
    tokens = min(max(chunk // B, 1), T)

    out = h.new_zeros(len(TOKEN_METRICS) if s.paired else 1, T * B, dtype=wide)
    best = labels_TB.new_empty(passes, T * B)
    labels = labels_TB.reshape(-1)
    weights = None if weights_KTB is None else weights_KTB.to(wide).reshape(len(weights_KTB), -1)
    dh = torch.empty_like(h) if weights is not None and needs[0] else None
    dw = torch.zeros_like(weight, dtype=wide) if weights is not None and needs[1] else None
    # Triton's kernels read logits in their own dtype and compute in `wide`; PyTorch's operations need them wide.
    logits = h.new_empty(passes * tokens * B, len(rows), dtype=own_dtype if s.triton else wide)
    narrow = logits if own_dtype == logits.dtype else torch.empty_like(logits, dtype=own_dtype)
    if s.triton:
        from kvcat_nemo.kernels.losses.row_losses_triton import row_losses as transform
    else:
        transform = row_losses
    for t in range(0, T, tokens):
        part = slice(t, t + tokens)
        # [dense rows | masked rows]
        h_NM = h[part].unflatten(1, (passes, B)).transpose(0, 1).reshape(-1, M)
        N = len(h_NM) // passes
        x, low = logits[: passes * N], narrow[: passes * N]
        torch.mm(h_NM, rows.t(), out=low)
        if low is not x:
            x.copy_(low)
        if voc.real == 0:
            x.fill_(-3e4)  # no part of any sum, and a number in every dtype
        for i in range(0, N, block):
            a, b = i, min(i + block, N)
            at = slice(t * B + a, t * B + b)
            best[:, at] = transform(
                x[a:b],
                x[N + a : N + b] if s.paired else None,
                labels[at],
                None if weights is None else weights[:, at],
                s,
                out[:, at],
            )
        if weights is None:
            continue
        if low is not x:
            low.copy_(x)
        if dh is not None:
            dh[part] = (low @ rows).view(passes, -1, B, M).transpose(0, 1).flatten(1, 2)
        if dw is not None:
            _add_product(dw[: len(rows)], low, h_NM, s.memory)
    if s.paired:
        top_dense, top_masked = voc.reduce(best, ReduceOp.MIN)  # the first of equals, as argmax has it
        out[3] = top_dense == top_masked
    return out.view(-1, T, B), None if dh is None else voc.own(dh), dw


def _add_product(total_VM: Tensor, d_NV: Tensor, h_NM: Tensor, memory: int) -> None:
    """total += dᵀ·h. Sums of narrow products are kept wide: there is one for every chunk."""
    if total_VM.dtype == d_NV.dtype:
        total_VM.addmm_(d_NV.t(), h_NM)
        return
    step = max(memory // (total_VM.shape[1] * d_NV.dtype.itemsize), 1)
    for v in range(0, len(total_VM), step):
        total_VM[v : v + step] += d_NV[:, v : v + step].t() @ h_NM
