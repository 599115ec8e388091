"""L-BFGS over many small independent problems at once (Nocedal & Wright, Numerical Optimization, §7.2).

Every problem has its own curvature history and step length; problems share nothing but the calls of the function.

Shapes: P problems, N unknowns of each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_DECREASE = 1e-4
_HALVINGS = 12


def minimise(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    start_PN: Tensor,
    *,
    iterations: int,
    history: int = 8,
    first_step: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Go downhill for so many iterations.

    Args:
        function: x [P, N] → losses [P] and their gradients [P, N].
        first_step: length of the first step, before anything is known of the curvature, in the norm of x.

    Returns:
        x [P, N] and its losses [P]; no problem's loss is above its start's.
    """
    x = start_PN
    loss, gradient = function(x)
    moves: list[Tensor] = []
    changes: list[Tensor] = []
    inverse: list[Tensor] = []
    for _ in range(iterations):
        direction = _direction(gradient, moves, changes, inverse, first_step)
        slope = (gradient * direction).sum(-1)
        # A direction that rounding has turned uphill is replaced by the gradient's own.
        uphill = slope >= 0
        steepest = -gradient * (first_step / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30))
        direction = torch.where(uphill[:, None], steepest, direction)
        slope = torch.where(uphill, (gradient * steepest).sum(-1), slope)
        new_x, new_loss, new_gradient = _search(function, x, loss, gradient, direction, slope)
        if torch.equal(new_x, x):
            break
        moves.append(new_x - x)
        changes.append(new_gradient - gradient)
        curvature = (moves[-1] * changes[-1]).sum(-1)
        enough = curvature > 1e-10 * moves[-1].norm(dim=-1) * changes[-1].norm(dim=-1)
        inverse.append(torch.where(enough, 1 / curvature, 0))
        for kept in (moves, changes, inverse):
            del kept[:-history]
        x, loss, gradient = new_x, new_loss, new_gradient
    return x, loss


def _direction(gradient, moves, changes, inverse, first_step) -> Tensor:
    """−H·gradient by the two loops; pairs without curvature (inverse 0) leave it as it is."""
    q, weights = gradient, []
    for s, y, rho in zip(reversed(moves), reversed(changes), reversed(inverse), strict=True):
        weights.append(rho * (s * q).sum(-1))
        q = q - weights[-1][:, None] * y
    q = q * _initial_scale(gradient, moves, changes, inverse, first_step)[:, None]
    for s, y, rho, a in zip(moves, changes, inverse, reversed(weights), strict=True):
        q = q + (a - rho * (y * q).sum(-1))[:, None] * s
    return -q


def _initial_scale(gradient, moves, changes, inverse, first_step) -> Tensor:
    scale = first_step / gradient.norm(dim=-1).clamp(min=1e-30)
    for s, y, rho in zip(moves, changes, inverse, strict=True):  # the newest pair with curvature decides
        newer = (s * y).sum(-1) / y.square().sum(-1).clamp(min=1e-30)
        scale = torch.where(rho > 0, newer, scale)
    return scale


def _search(function, x, loss, gradient, direction, slope):
    """Halve each problem's step until its loss falls enough; one that never does stays where it is."""
    step = torch.ones_like(loss)
    best_x, best_loss, best_gradient = x, loss, gradient
    open_ = torch.ones_like(loss, dtype=torch.bool)
    for _ in range(_HALVINGS):
        trial = torch.where(open_[:, None], x + step[:, None] * direction, best_x)
        trial_loss, trial_gradient = function(trial)
        good = open_ & (trial_loss <= loss + _DECREASE * step * slope)  # NaN is not good
        best_x = torch.where(good[:, None], trial, best_x)
        best_loss = torch.where(good, trial_loss, best_loss)
        best_gradient = torch.where(good[:, None], trial_gradient, best_gradient)
        open_ = open_ & ~good
        if not bool(open_.any()):
            break
        step = torch.where(open_, step / 2, step)
    return best_x, best_loss, best_gradient
