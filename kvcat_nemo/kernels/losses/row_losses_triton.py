"""Metrics of rows of logits and the logits' gradients, in two Triton kernels: kernels/losses/row_losses.py's figures with less traffic.

The first kernel reads each logit once and keeps running sums per row (the maximum may still grow: the sums are scaled
when it does). The second reads each logit once more and writes its gradient in its place, in the logits' own dtype.
With its matrix products a bf16 logit costs 12 bytes of traffic, where PyTorch's operations in float32 cost 70
(docs/roofline.md, computed).

Per row, with x and y the logits of the dense and the masked pass, m their maxima and τ the temperature:

    S = Σ e^{x − m_x}    S' = Σ e^{y − m_y}    P = Σ e^{(x − m_x)/τ}    Q = Σ e^{(y − m_y)/τ}
    C = Σ e^{(x − m_x)/τ}·(x − y)              R = Σ e^{(y − m_y)/τ}·(x − y)
    KL(p ‖ q) = C/(P·τ) − g        KL(q ‖ p) = g − R/(Q·τ)        g = (m_x − m_y)/τ + log P − log Q

Shapes: N rows, V this rank's part of the vocabulary.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ReduceOp

from kvcat_nemo.kernels.losses.row_losses import row_losses as plain_row_losses

BLOCK = 4096
"""Columns that a program holds at a time."""


@triton.jit
def _statistics(
    x_ptr,
    y_ptr,
    at_ptr,
    out_ptr,
    best_ptr,
    N,
    V,
    x_stride,
    y_stride,
    inverse_tau,
    PAIRED: tl.constexpr,
    TEMPERED: tl.constexpr,
    MIXED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: maxima and their places, the label's logits, and the sums of the module's docstring."""
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    y_row = y_ptr + row * y_stride
    lowest = float("-inf")
    m_x = tl.full((), lowest, WIDE)
    m_y = tl.full((), lowest, WIDE)
    best_x = tl.full((), 0, tl.int64)
    best_y = tl.full((), 0, tl.int64)
    s_x = tl.full((), 0.0, WIDE)
    s_y = tl.full((), 0.0, WIDE)
    p_sum = tl.full((), 0.0, WIDE)
    q_sum = tl.full((), 0.0, WIDE)
    cross = tl.full((), 0.0, WIDE)
    back = tl.full((), 0.0, WIDE)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        there = column < V
        x = tl.load(x_row + column, mask=there, other=lowest).to(WIDE)
        top = tl.max(x, axis=0)
        best_x = tl.where(top > m_x, start + tl.argmax(x, axis=0), best_x)
        new = tl.maximum(m_x, top)
        s_x = s_x * tl.exp(m_x - new) + tl.sum(tl.exp(x - new), axis=0)
        if PAIRED:
            y = tl.load(y_row + column, mask=there, other=lowest).to(WIDE)
            top_y = tl.max(y, axis=0)
            best_y = tl.where(top_y > m_y, start + tl.argmax(y, axis=0), best_y)
            new_y = tl.maximum(m_y, top_y)
            s_y = s_y * tl.exp(m_y - new_y) + tl.sum(tl.exp(y - new_y), axis=0)
            gap = tl.where(there, x, 0.0) - tl.where(there, y, 0.0)
            p = tl.exp((x - new) * inverse_tau)
            scale = tl.exp((m_x - new) * inverse_tau)
            cross = cross * scale + tl.sum(p * gap, axis=0)
            if TEMPERED:
                p_sum = p_sum * scale + tl.sum(p, axis=0)
            if TEMPERED or MIXED:
                q = tl.exp((y - new_y) * inverse_tau)
                scale_y = tl.exp((m_y - new_y) * inverse_tau)
                if TEMPERED:
                    q_sum = q_sum * scale_y + tl.sum(q, axis=0)
                if MIXED:
                    back = back * scale_y + tl.sum(q * gap, axis=0)
            m_y = new_y
        m_x = new
    at = tl.load(at_ptr + row)
    mine = (at >= 0) & (at < V)
    tl.store(out_ptr + row, m_x)
    tl.store(out_ptr + N + row, s_x)
    tl.store(out_ptr + 2 * N + row, tl.load(x_row + at, mask=mine, other=0.0).to(WIDE))
    tl.store(best_ptr + row, best_x)
    if PAIRED:
        tl.store(out_ptr + 3 * N + row, m_y)
        tl.store(out_ptr + 4 * N + row, s_y)
        tl.store(out_ptr + 5 * N + row, tl.load(y_row + at, mask=mine, other=0.0).to(WIDE))
        tl.store(out_ptr + 6 * N + row, p_sum if TEMPERED else s_x)
        tl.store(out_ptr + 7 * N + row, q_sum if TEMPERED else s_y)
        tl.store(out_ptr + 8 * N + row, cross)
        tl.store(out_ptr + 9 * N + row, back)
        tl.store(best_ptr + N + row, best_y)


@triton.jit
def _gradients(
    x_ptr,
    y_ptr,
    at_ptr,
    row_ptr,
    N,
    V,
    x_stride,
    y_stride,
    inverse_tau,
    share,
    PAIRED: tl.constexpr,
    MIXED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's block: logits become their gradients. `row_ptr` holds `_coefficients`, [8, N]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < V
    m_x = tl.load(row_ptr + row)
    a_x = tl.load(row_ptr + N + row)
    a_label = tl.load(row_ptr + 2 * N + row)
    at = tl.load(at_ptr + row)
    x_at = x_ptr + row * x_stride + column
    x = tl.load(x_at, mask=there, other=0.0).to(WIDE)
    dx = tl.exp(x - m_x) * a_x - tl.where(column == at, a_label, 0.0)
    if PAIRED:
        m_y = tl.load(row_ptr + 3 * N + row)
        a_p = tl.load(row_ptr + 4 * N + row)
        a_q = tl.load(row_ptr + 5 * N + row)
        y_at = y_ptr + row * y_stride + column
        y = tl.load(y_at, mask=there, other=0.0).to(WIDE)
        p = tl.exp((x - m_x) * inverse_tau)
        q = tl.exp((y - m_y) * inverse_tau)
        if MIXED:
            offset = tl.load(row_ptr + 6 * N + row)
            pull = share - (1.0 - share) * (((x - m_x) - (y - m_y)) * inverse_tau + offset)
            dy = q * a_q * pull - p * a_p * share
        else:
            dy = q * a_q - p * a_p
        tl.store(y_at, dy.to(y_ptr.dtype.element_ty), mask=there)
    tl.store(x_at, dx.to(x_ptr.dtype.element_ty), mask=there)


def row_losses(x: Tensor, y: Tensor | None, labels: Tensor, weights: Tensor | None, s, out: Tensor) -> Tensor:
    """kernels.losses.row_losses.row_losses; x and y may be in a 16-bit dtype, and then so are their gradients.

    Sums and metrics are in at least float32.
    """
    voc, tau = s.vocabulary, s.temperature
    N, V = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    paired, mixed = y is not None, y is not None and s.forward_share != 1
    both = x if y is None else y
    held = labels - voc.first
    mine = (held >= 0) & (held < voc.real)
    at = torch.where(mine, held, -1)
    stats = torch.zeros(10 if paired else 3, N, dtype=wide, device=x.device)
    best = torch.empty(1 + paired, N, dtype=torch.int64, device=x.device)
    settings = {"PAIRED": paired, "MIXED": mixed, "WIDE": _WIDE[wide], "BLOCK": _block(V)}
    strides = (x.stride(0), both.stride(0))
    tempered = {"TEMPERED": paired and tau != 1}
    _statistics[(N,)](x, both, at, stats, best, N, V, *strides, 1 / tau, **tempered, **settings)

    maxima = stats[0::3][: 1 + paired]
    top = voc.reduce(maxima.clone(), ReduceOp.MAX)
    best = torch.where(maxima == top, best + voc.first, torch.iinfo(best.dtype).max)
    if voc.group is not None:  # sums against this rank's maxima become sums against all ranks'
        lower = (maxima - top).exp()
        for i in range(1 + paired):
            stats[1 + 3 * i] *= lower[i]
        if paired:
            lower = lower if tau == 1 else lower.pow(1 / tau)
            stats[6::2] *= lower[0]
            stats[7::2] *= lower[1]
    for i in range(1 + paired):
        stats[2 + 3 * i] = torch.where(mine, stats[2 + 3 * i] - top[i], 0.0)
    sums = voc.reduce(stats)
    out[0] = sums[1].log() - sums[2]
    if paired:
        P, Q, C, R = sums[6:10]
        shift = (top[0] - top[1]) / tau + P.log() - Q.log()
        kl = C / (P * tau) - shift
        reverse = shift - R / (Q * tau)
        out[1] = tau**2 * (s.forward_share * kl + (1 - s.forward_share) * reverse if mixed else kl)
        out[2] = sums[4].log() - sums[5]
    if weights is None:
        return best
    rows = torch.empty(8, N, dtype=wide, device=x.device)
    rows[0], rows[1], rows[2] = top[0], weights[0] / sums[1], weights[0] * mine
    if paired:
        rows[3] = top[1]
        rows[4], rows[5] = tau * weights[1] / P, tau * weights[1] / Q
        # log q̂ − log p̂ − KL(q ‖ p) = −(gap of shifted logits)/τ − (log Q − log P) − reverse
        rows[6] = Q.log() - P.log() + reverse
    grid = (N, triton.cdiv(V, settings["BLOCK"]))
    _gradients[grid](x, both, at, rows, N, V, *strides, 1 / tau, s.forward_share, **settings)
    return best


_WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


def _block(columns: int) -> int:
    return min(BLOCK, triton.next_power_of_2(columns))


SMALL_CASES = (
    (torch.float32, True, 1.0, 0.6),
    (torch.bfloat16, True, 1.0, 1.0),
    (torch.bfloat16, True, 2.0, 0.6),
    (torch.bfloat16, False, 1.0, 1.0),
)
"""(dtype of logits, paired, temperature, forward share): each compiles kernels of its own, and bf16 is what a run trains in."""


@functools.cache
def failure(device: torch.device) -> str:
    """Why this form cannot be used on a device; empty when small cases give the plain form's figures there.

    No GPU has run these kernels in this project's tests: a run looks for itself before it trusts them.
    """
    try:
        found = (_difference(device, *case) for case in SMALL_CASES)
        return next((difference for difference in found if difference), "")
    except Exception as error:  # a compiler, a driver or a launch: whatever it is, the plain form is there
        return f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}"


def _difference(device: torch.device, dtype: torch.dtype, paired: bool, tau: float, share: float) -> str:
    """How a small case in `dtype` differs from the plain form, which computes in float32 from the same logits."""
    from kvcat_nemo.kernels.losses.token_sweep import Settings, Vocabulary

    N, V = 3, 5008  # more than one block; rows begin at multiples of 16, as in training
    s = Settings(Vocabulary(None, False, 0, V), paired, tau, share, 1 << 20)
    rng = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(2, N, V, generator=rng)
    for i, place in enumerate(
        (4500, 7)
    ):  # the largest is alone in bf16 too: of equals each form may take another
        logits[i, :, place] = logits[i].amax(-1) + 1
    logits = logits.to(device, dtype)
    labels = torch.tensor([0, V - 1, 4096], device=device)
    weights = torch.rand(1 + paired, N, generator=rng).to(device)
    results = []
    for form, given in ((plain_row_losses, torch.float32), (row_losses, dtype)):
        x, y = logits.to(given, copy=True).unbind()
        out = torch.zeros(4 if paired else 1, N, device=device)
        best = form(x, y if paired else None, labels, weights, s, out)
        results.append((x.float(), y.float(), out, best.float()))
    # Both forms round sums of 5,008 terms in float32; gradients are rounded once to `dtype`, by at most half the distance
    # between 1 and the next number (all of it where digits are cut off, as by Triton's interpreter).
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, plain, ours in zip(("dense", "masked", "metrics", "best"), *results, strict=True):
        bound = 1e-4 + (rounding if name in ("dense", "masked") else 0.0)
        if not torch.allclose(ours, plain, rtol=bound, atol=1e-6):
            gap = float((ours - plain).abs().max())
            return f"{dtype}, {name}: differs from the plain form by {gap:.3g}"
    return ""
