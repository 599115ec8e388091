"""Slots without padding, as files hold them: what a file says is checked before memory is asked for."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def expect(x: Tensor, name: str, dims: int, *, whole: bool = False, entries: int | None = None) -> None:
    """Check what a file says of a tensor before anything is made of it.

    Args:
        dims: how many dimensions; all but the first must hold something.
        whole: integers, else floating-point numbers; entries: size of the first dimension, None for any.

    Raises:
        RuntimeError: it is otherwise.
    """
    if x.dim() != dims or 0 in x.shape[1:]:
        raise RuntimeError(f"{name} is of shape {tuple(x.shape)}, {dims} dimensions wanted")
    if x.is_floating_point() == whole or x.dtype == torch.bool or x.is_complex():
        raise RuntimeError(f"{name} is of {x.dtype}")
    if entries is not None and len(x) != entries:
        raise RuntimeError(f"{name}: {len(x)} entries for {entries} places")


def check_memory(wanted: int, name: str) -> None:
    """Refuse what this machine's memory could not hold."""
    if wanted > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise RuntimeError(f"{name}: {wanted:,} bytes when padded, the machine has {memory:,}")


def check_counts(counts: Tensor, entries: int, name: str, *, most: int) -> None:
    """Check counts that a file holds against what else it holds, before they decide how much memory is asked for.

    Args:
        counts: how many entries each place has; entries: how many there are in all.
        most: entries that a place can have.

    Raises:
        RuntimeError: the counts are not those of the entries.
    """
    expect(counts, name, counts.dim(), whole=True)
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > most):
        raise RuntimeError(f"{name}: from {int(counts.min())} to {int(counts.max())}, 0 to {most} possible")
    total = int(counts.long().sum())  # each at most `most`: no overflow
    if total != entries:
        raise RuntimeError(f"{entries} entries for {total} places")


def spread(packed_Px: Tensor, present: Tensor, *, empty: float = 0) -> Tensor:
    """Packed entries at the places where `present` is true, in its order; `empty` elsewhere."""
    if len(packed_Px) != int(present.sum()):
        raise RuntimeError(f"{len(packed_Px)} entries for {int(present.sum())} places")
    out = packed_Px.new_full((*present.shape, *packed_Px.shape[1:]), empty)
    out[present] = packed_Px
    return out
