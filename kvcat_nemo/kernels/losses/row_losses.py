"""Metrics of a block of rows of logits, and the logits' gradients in their place: plain PyTorch, for every device.

kernels/losses/row_losses_triton.py does the same in two kernels. kernels/losses/token_sweep.py chooses between them.

Shapes: N rows (tokens × windows) of each pass, V this rank's part of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ReduceOp


def row_losses(x: Tensor, y: Tensor | None, labels: Tensor, weights: Tensor | None, s, out: Tensor) -> Tensor:
    """Metrics of a block of rows; its logits become their gradients when `weights` are given.

    Args:
        x, y: logits [N, V] of the dense and the masked pass, overwritten; y is None for a dense-only batch.
        labels: [N]. weights: of CE and KL, [2, N] ([1, N]). s: kernels.losses.token_sweep.Settings.
        out: metrics, [4, N] ([1, N]); all but the last of a paired batch are written.

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
