"""Whether two runs are the same: figures, first masks, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

from kvcat_nemo.runs.metrics_file import TIMED

BOUND = 1e-2
"""Of a figure, relative where it exceeds 1: bf16 against float32 over ten steps."""

DISCRETE = ("flipped", "top1_agreement")
"""Shares of some hundred tokens, of which a single near-tie moves them by more than the bound."""


def figures_differ(
    lines: Iterable[dict[str, float]], expected: Iterable[dict[str, float]], bound: float = BOUND
) -> list[str]:
    """In words, every figure of a step that differs by more than the bound; the first step is number 1."""
    lines, expected, out = list(lines), list(expected), []
    if len(lines) != len(expected):
        out.append(f"{len(lines)} steps, {len(expected)} expected")
    for number, (ours, theirs) in enumerate(zip(lines, expected, strict=False), 1):
        names = [
            n for n in theirs if n.split("/")[0] not in (*DISCRETE, *TIMED) and isinstance(theirs[n], float)
        ]
        if not names:
            out.append(f"step {number}: no figures")
        for name in names:
            value = ours.get(name, math.nan)
            off = abs(value - theirs[name])
            if not off <= bound * max(1.0, abs(theirs[name])):  # NaN differs from everything
                out.append(f"step {number}: {name} is {value:.6g}, expected {theirs[name]:.6g}")
    return out


def near_tie(layers: int, hidden: int) -> float:
    """How far a keep probability may move by bf16 rounding of what its router reads.

    p = (1 − ⟨u, w⟩)/2 with unit vectors of `hidden` elements. Some six roundings a layer, each 2⁻⁸ of an element at most,
    add up like a random walk to ε = 2⁻⁸·√(6·layers); an error that points anywhere changes the cosine by ε/√hidden, of u and
    of w; four standard deviations of that.
    """
    epsilon = 2.0**-8 * math.sqrt(6 * layers)
    return 0.5 * 4 * math.sqrt(2) * epsilon / math.sqrt(hidden)


def masks_differ(
    ours: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor], tie: float
) -> tuple[list[str], float]:
    """(In words, every difference of keep decisions p > ½ beyond near-ties; the share of tokens that were compared.)"""
    out = []
    if set(ours) != set(theirs) or not theirs:
        return [f"masks of groups {sorted(ours)}, expected {sorted(theirs)}"], 0.0
    compared = tokens = 0
    for group, expected in theirs.items():
        clear = (expected - 0.5).abs() > tie
        wrong = ((ours[group] > 0.5) != (expected > 0.5)) & clear
        compared, tokens = compared + int(clear.sum()), tokens + clear.numel()
        if wrong.any():
            out.append(
                f"group {group}: {int(wrong.sum())} of {int(clear.sum())} clear decisions differ, p = "
                f"{float(ours[group][wrong][0]):.4f} for {float(expected[wrong][0]):.4f}"
            )
    share = compared / tokens
    if share < 0.5:
        out.append(f"only {share:.0%} of the decisions are clear: the comparison shows little")
    return out, share


def stored(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, whole."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(str(folder))
    known = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in known.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def checkpoint_differences(one: str | Path, other: str | Path) -> list[str]:
    """In words, every tensor (weights, master weights, moments) that is not the same to the last bit in both."""
    ours, theirs = stored(one), stored(other)
    out = [f"{name} is in one of them alone" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.dim() and b.dim():  # the vocabulary is padded for the layout
            a, b = (x[: min(len(a), len(b))] for x in (a, b))
        if a.shape != b.shape or not torch.equal(a, b):
            out.append(f"{name} differs")
    if not any("exp_avg" in name for name in ours):
        out.append("no optimizer state")
    return out
