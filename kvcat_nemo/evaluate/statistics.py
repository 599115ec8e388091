"""Means, standard errors and paired comparisons; float64, NumPy alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Mean, weighted if asked for.

    Raises:
        ValueError: when there are no values, or the weights don't fit.
    """
    x = _values(values)
    if weights is None:
        return float(x.mean())
    w = np.asarray(weights, dtype=np.float64)
    if w.shape != x.shape or (w < 0).any() or w.sum() == 0:
        raise ValueError(f"weights: {w.size} given for {x.size} values; each must be ≥ 0 and one above 0")
    return float((w * x).sum() / w.sum())


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, √(Σ(x − x̄)² / (n(n − 1))); None for a single value, which has none."""
    x = _values(values)
    return float(x.std(ddof=1) / np.sqrt(x.size)) if x.size > 1 else None


def jackknife(statistic: Callable[[np.ndarray], float], n: int) -> float | None:
    """Standard error of any statistic of n items, by leaving out one at a time; None for a single item.

    Args:
        statistic: takes the indices that stay, [n − 1] integers.
    """
    if n < 2:
        return None
    everything = np.arange(n)
    left = np.array([statistic(np.delete(everything, i)) for i in range(n)], dtype=np.float64)
    return float(np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum()))


@dataclass(frozen=True)
class Paired:
    """Mean of after − before over the same items."""

    difference: float
    standard_error: float | None
    p: float
    """Two-sided, of the sign-flip test: how often random signs on the differences give a mean as far from 0."""
    n: int


def paired(before: Sequence[float], after: Sequence[float], *, flips: int = 20_000, seed: int = 0) -> Paired:
    """Compare two measurements of the same items.

    p assumes nothing of how the differences are distributed, only that without an effect their signs are arbitrary. It
    is exact up to 14 items that differ; beyond, `flips` random sign vectors are drawn and the observed one counts too.

    Raises:
        ValueError: when there are no items, or unequally many.
    """
    a, b = _values(before), _values(after)
    if a.shape != b.shape:
        raise ValueError(f"paired: {a.size} values before, {b.size} after; both must be of the same items")
    x = b - a
    moved = x[x != 0]
    observed = abs(moved.sum()) * (1 - 1e-12)  # equal sums in another order must count as equal
    if moved.size <= 14:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=moved.size)))
        p = float((np.abs(signs @ moved) >= observed).mean())
    else:
        generator, at_least = np.random.default_rng(seed), 1
        for first in range(0, flips, 1000):
            drawn = generator.integers(0, 2, (min(1000, flips - first), moved.size)) * 2.0 - 1
            at_least += int((np.abs(drawn @ moved) >= observed).sum())
        p = at_least / (flips + 1)
    return Paired(float(x.mean()), standard_error(x), p, int(x.size))


def _values(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError(f"values: a list of at least one number is needed, got shape {x.shape}")
    return x
