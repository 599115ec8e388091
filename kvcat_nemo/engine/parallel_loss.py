"""Cross-entropy and KL of a paired batch over a vocabulary split between tensor-parallel ranks, in one pass.

Works on chunks of tokens, so that the wide temporaries (float32 softmaxes) never exist for all tokens at once.

Shapes: T tokens, B windows, 2B the paired batch [dense | masked], V this rank's part of the (padded) vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ReduceOp

CHUNK_TOKENS = 256
TOKEN_METRICS = ("ce_dense", "kl", "ce_masked", "top1")
"""Rows of a paired batch's token metrics; a dense-only batch has the first alone."""


class _Shard:
    """This rank's columns of the vocabulary and the reductions over all ranks'."""

    def __init__(self, group, vocab_size: int, columns: int):
        self.group = group if group is not None and group.size() > 1 else None
        rank = group.rank() if self.group is not None else 0
        self.first = rank * columns
        self.real = min(max(vocab_size - self.first, 0), columns)  # columns after these are padding

    def reduce(self, x: Tensor, op=ReduceOp.SUM) -> Tensor:
        if self.group is not None:
            torch.distributed.all_reduce(x, op=op, group=self.group)
        return x

    def widen(self, logits: Tensor) -> Tensor:
        """A copy in at least float32, with padding columns out of the softmax."""
        x = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if self.real < x.shape[-1]:
            x[
                ..., self.real :
            ] = -1e30  # finite after a temperature too: −inf − (−inf) would be NaN in the KL
        return x

    def log_softmax(self, x: Tensor) -> Tensor:
        top = self.reduce(x.amax(-1, keepdim=True), ReduceOp.MAX)
        x = x - top
        return x - self.reduce(x.exp().sum(-1, keepdim=True)).log()

    def pick(self, logp: Tensor, labels: Tensor) -> Tensor:
        """logp at the labels, wherever they live."""
        local = labels - self.first
        mine = (local >= 0) & (local < self.real)
        value = logp.gather(-1, local.clamp(0, logp.shape[-1] - 1)[..., None])[..., 0]
        return self.reduce(torch.where(mine, value, torch.zeros_like(value)))

    def argmax(self, x: Tensor) -> Tensor:
        value, index = x.max(-1)
        best = self.reduce(value.clone(), ReduceOp.MAX)
        index = torch.where(
            value == best, index + self.first, torch.full_like(index, torch.iinfo(index.dtype).max)
        )
        return self.reduce(index, ReduceOp.MIN)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, shard: _Shard, temperature: float, paired: bool, chunk: int):
        T, width = logits.shape[:2]
        B = width // 2 if paired else width
        dtype = torch.promote_types(logits.dtype, torch.float32)
        out = logits.new_zeros(len(TOKEN_METRICS) if paired else 1, T, B, dtype=dtype)
        for t in range(0, T, chunk):
            part = slice(t, t + chunk)
            dense = shard.widen(logits[part, :B])
            logp = shard.log_softmax(dense)
            out[0, part] = -shard.pick(logp, labels[part])
            if not paired:
                continue
            masked = shard.widen(logits[part, B:])
            logq = shard.log_softmax(masked)
            out[2, part] = -shard.pick(logq, labels[part])
            out[3, part] = shard.argmax(dense) == shard.argmax(masked)
            if temperature != 1:
                logp, logq = shard.log_softmax(dense / temperature), shard.log_softmax(masked / temperature)
            out[1, part] = temperature**2 * shard.reduce((logp.exp() * (logp - logq)).sum(-1))
        ctx.save_for_backward(logits, labels)
        ctx.settings = shard, temperature, paired, chunk
        return out

    @staticmethod
    def backward(ctx, grad):
        logits, labels = ctx.saved_tensors
        shard, temperature, paired, chunk = ctx.settings
        T, width = logits.shape[:2]
        B = width // 2 if paired else width
        out = torch.empty_like(logits)
        for t in range(0, T, chunk):
            part = slice(t, t + chunk)
            dense = shard.widen(logits[part, :B])
            p = shard.log_softmax(dense).exp_()
            # The label's column: p − 1 there, and p elsewhere, times the gradient of the cross-entropy.
            local = labels[part] - shard.first
            mine = ((local >= 0) & (local < shard.real)).to(p.dtype)
            d = p.scatter_add(-1, local.clamp(0, p.shape[-1] - 1)[..., None], -mine[..., None])
            out[part, :B] = d.mul_(grad[0, part, :, None])
            if not paired:
                continue
            masked = shard.widen(logits[part, B:])
            if temperature != 1:
                p = shard.log_softmax(dense / temperature).exp_()
                masked = masked / temperature
            q = shard.log_softmax(masked).exp_()
            out[part, B:] = q.sub_(p).mul_(temperature * grad[1, part, :, None])
        return out, None, None, None, None, None


def token_losses(
    logits_TBV: Tensor,
    labels_BT: Tensor,
    *,
    vocab_size: int,
    group=None,
    paired: bool = True,
    temperature: float = 1.0,
    chunk: int = CHUNK_TOKENS,
) -> Tensor:
    """Per-token metrics of a batch, of which the first two carry gradients.

    Args:
        logits_TBV: [T, 2B, V] for a paired batch (windows of the dense pass, then of the masked one), [T, B, V] else.
        labels_BT: next tokens, [B, T].
        vocab_size: the true vocabulary; columns beyond it are padding and take no probability.
        group: tensor-parallel process group, or None.
        temperature: τ of both sides of the KL, which is multiplied by τ².

    Returns:
        [4, B, T] (`TOKEN_METRICS`): cross-entropy of the dense pass; KL(dense ‖ masked), no gradient to the dense
        side; cross-entropy of the masked pass (no gradient); 1 where both passes' likeliest tokens agree. [1, B, T]
        when not paired. In nats, float32 or wider.
    """
    shard = _Shard(group, vocab_size, logits_TBV.shape[-1])
    labels = labels_BT.transpose(0, 1).contiguous()
    return _TokenLosses.apply(logits_TBV, labels, shard, temperature, paired, chunk).transpose(1, 2)
