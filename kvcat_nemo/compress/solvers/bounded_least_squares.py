"""Least squares with bounds, batched, from normal equations.

Shapes: G problems, K unknowns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALVINGS = 12


def solve_spd(H_GKK: Tensor, c_GK: Tensor) -> Tensor:
    """H⁻¹c, [G, K], of symmetric positive definite matrices."""
    return torch.cholesky_solve(c_GK[..., None], torch.linalg.cholesky(H_GKK))[..., 0]


def bounded_least_squares(
    H_GKK: Tensor,
    c_GK: Tensor,
    low: float,
    high: float,
    *,
    start_GK: Tensor | None = None,
    steps: int = 50,
    tolerance: float = 1e-9,
) -> Tensor:
    """argmin ½bᵀHb − cᵀb with low ≤ b ≤ high: projected Newton steps (Bertsekas 1982, SIAM J. Control Optim. 20:2).

    A variable at a bound whose gradient pushes outwards is held there; the others take a Newton step, of which the
    longest of 1, ½, ¼, … that descends most is kept, projected onto the bounds. Usually a handful of steps are exact.

    Args:
        H_GKK: MᵀM, positive definite (add a ridge first); c_GK: Mᵀy. Best in float64.
        start_GK: first guess; ones by default.
        steps: at most so many.
        tolerance: on the projected gradient, relative to the largest |c|.

    Returns:
        [G, K].
    """
    b = torch.ones_like(c_GK) if start_GK is None else start_GK
    b = b.clamp(low, high)
    fractions = 0.5 ** torch.arange(_HALVINGS, device=b.device, dtype=b.dtype)
    enough = tolerance * c_GK.abs().amax(-1)
    identity = torch.eye(b.shape[-1], dtype=torch.bool, device=b.device)
    for _ in range(steps):
        gradient = (H_GKK @ b[..., None])[..., 0] - c_GK
        if bool((((b - gradient).clamp(low, high) - b).abs().amax(-1) <= enough).all()):
            break
        held = ((b <= low) & (gradient > 0)) | ((b >= high) & (gradient < 0))
        either = held[:, :, None] | held[:, None, :]
        free = torch.where(either & ~identity, 0, H_GKK)
        move = -solve_spd(free, gradient.masked_fill(held, 0))
        tried_GNK = (b[:, None] + fractions[:, None] * move[:, None]).clamp(low, high)
        change = tried_GNK - b[:, None]
        # Differences of the objective, not the objective: it is large and the last gains are small.
        gain = ((0.5 * change @ H_GKK + gradient[:, None]) * change).sum(-1)
        best = gain.argmin(-1)
        lower = gain.gather(1, best[:, None]) < 0
        taken = tried_GNK.gather(1, best[:, None, None].expand(-1, 1, b.shape[-1]))[:, 0]
        b = torch.where(lower, taken, b)
        if not bool(lower.any()):
            break
    return b
