"""Rows that both halves of a paired batch share: with a mask for rows behind a cut alone, those before it.

Such a row computes the same numbers in the dense and in the masked half. It must be the same bit for bit, so that rows behind
the cut read the keys and values that the dense pass leaves in a cache. Kernels do not promise this: a matrix product may
sum rows of another tile in another order, and a fused attention call of another length cuts its blocks otherwise. So the
masked half takes these rows from the dense half, after each step that mixes tokens and after each layer. What they get as
gradient goes to the dense half too, whose numbers and weights are the same: every parameter's gradient is as before.

Shapes: T tokens (T/ranks under sequence parallelism), B windows, 2B the paired batch [dense | masked].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.method.spans import Spans


class FirstSpansShared(torch.autograd.Function):
    """x [T, 2B, …] → the same, but the masked half's rows of each document's first span are the dense half's."""

    @staticmethod
    def forward(ctx, x: Tensor, spans: Spans, first: int = 0) -> Tensor:
        """first: the window's token that x begins with."""
        ctx.places = _places(spans, first, x.shape[0])
        out = x.clone(memory_format=torch.contiguous_format)
        for rows, dense, masked in ctx.places:
            out[rows, masked] = x[rows, dense]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        out = grad.clone(memory_format=torch.contiguous_format)
        for rows, dense, masked in ctx.places:
            out[rows, dense] += grad[rows, masked]
            out[rows, masked] = 0
        return out, None, None


def _places(spans: Spans, first: int, tokens: int) -> list[tuple[slice, int, int]]:
    """(rows of x, the window's place in the dense half, and in the masked half) of every first span."""
    out = []
    for span in spans.spans:
        start, end = max(span.start - first, 0), min(span.end - first, tokens)
        if not span.behind and start < end:
            out.append((slice(start, end), span.window, spans.windows + span.window))
    return out
