"""One sweep of kernels.token_loss over the chunks of a batch: metrics, and the gradients of given token weights.

Shapes: T tokens, B windows, 2B the paired batch [dense | masked], M width, V this rank's part of the (padded)
vocabulary, N rows of a chunk or block of each pass: tokens × windows. K metrics, or of weights those of CE and KL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ReduceOp

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

    def rows(self, weight: Tensor, wide: torch.dtype) -> tuple[int, int]:
        """Rows of each pass in a chunk, and how many of them are transformed at a time."""
        columns = len(weight)  # not the true ones alone: every rank must come to the same number of chunks
        blocks = self.vocabulary.group is None and weight.device.type == "cpu"
        scratch = (0 if blocks else 1 + (self.temperature != 1)) if self.paired else 0
        if scratch and self.forward_share != 1:
            scratch = 4
        narrow = weight.dtype.itemsize if weight.dtype != wide else 0
        bytes_per_row = columns * ((1 + self.paired) * (wide.itemsize + narrow) + scratch * wide.itemsize)
        chunk = max(self.memory // bytes_per_row, 1)
        return chunk, max(_BLOCK_BYTES // (columns * wide.itemsize), 1) if blocks else chunk


def _softmaxes(x: Tensor, y: Tensor | None, labels: Tensor, weights: Tensor | None, s: Settings, out: Tensor):
    """Metrics of a block of rows; its logits become their gradients when `weights` are given.

    Args:
        x, y: logits [N, V] of the dense and the masked pass, overwritten; y is None for a dense-only batch.
        labels: [N]. weights: of CE and KL, [2, N] ([1, N]). out: metrics, [4, N] ([1, N]); written.

    Returns:
        token ids of the largest logits of this rank's vocabulary that are the largest of all ranks', [2, N].
    """
    voc, tau = s.vocabulary, s.temperature
    passes = [x] if y is None else [x, y]
    best = torch.stack([z.argmax(-1) for z in passes])
    local = torch.stack([z.gather(-1, i[:, None])[:, 0] for z, i in zip(passes, best, strict=True)])
    top = voc.reduce(local.clone(), ReduceOp.MAX)
    best = torch.where(local == top, best + voc.first, torch.iinfo(best.dtype).max)

    here = labels - voc.first
    mine = (here >= 0) & (here < voc.real)
    here = here.clamp(0, x.shape[-1] - 1)[:, None]
    sums = []
    for z, t in zip(passes, top, strict=True):
        z.sub_(t[:, None])
        sums.append(torch.where(mine, z.gather(-1, here)[:, 0], 0.0))
    mixed = y is not None and s.forward_share != 1
    if y is None:
        sums.append(x.exp_().sum(-1))
    elif mixed:
        gap, p, q = (x - y).div_(tau), torch.exp(x / tau), torch.exp(y / tau)
        sums += [
            x.exp_().sum(-1),
            y.exp_().sum(-1),
            p.sum(-1),
            q.sum(-1),
            (p * gap).sum(-1),
            (q * gap).sum(-1),
        ]
    elif tau == 1:
        gap = x - y
        sums += [x.exp_().sum(-1), y.exp_().sum(-1), gap.mul_(x).sum(-1)]
    else:
        p = torch.exp(x)  # x itself is needed at both temperatures
        sums.append(p.sum(-1))
        sums.append(torch.exp(y, out=p).sum(-1))
        torch.div(x, tau, out=p)
        gap = p - y.div_(tau)
        sums += [p.exp_().sum(-1), y.exp_().sum(-1), gap.mul_(p).sum(-1)]
    sums = voc.reduce(torch.stack(sums))

    if y is None:
        label, total = sums
        out[0] = total.log() - label
    else:
        label, label_masked, total, total_masked = sums[:4]
        p_total, q_total, cross = sums[2:5] if tau == 1 and not mixed else sums[4:7]
        out[0] = total.log() - label
        shift = q_total.log() - p_total.log()
        kl = cross / p_total + shift
        if mixed:
            reverse = -sums[7] / q_total - shift
            kl = s.forward_share * kl + (1 - s.forward_share) * reverse
        out[1] = tau**2 * kl
        out[2] = total_masked.log() - label_masked
    if weights is None:
        return best

    if mixed:
        # q̂·(λ + (1 − λ)·(log q̂ − log p̂ − reverse)) − λ·p̂, normalised by their sums
        pull = gap.neg_().sub_((shift + reverse)[:, None]).mul_(1 - s.forward_share).add_(s.forward_share)
        torch.mul(q, pull, out=y).mul_((tau * weights[1] / q_total)[:, None])
        y.addcmul_(p, (tau * s.forward_share * weights[1] / p_total)[:, None], value=-1)
    elif y is not None:
        if tau == 1:
            p = x
        else:
            torch.div(x, tau, out=p).exp_()
            x.exp_()
        y.mul_((tau * weights[1] / q_total)[:, None])
        y.addcmul_(p, (tau * weights[1] / p_total)[:, None], value=-1)
    x.mul_((weights[0] / total)[:, None])
    x.scatter_add_(-1, here, -(weights[0] * mine)[:, None])
    return best


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
    logits = h.new_empty(passes * tokens * B, len(rows), dtype=wide)
    narrow = logits if own_dtype == wide else torch.empty_like(logits, dtype=own_dtype)
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
            x.fill_(-1e30)
        for i in range(0, N, block):
            a, b = i, min(i + block, N)
            at = slice(t * B + a, t * B + b)
            best[:, at] = _softmaxes(
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
