"""Whether attention's backward must add in one order: one rule for every kernel."""

from __future__ import annotations

import os

import torch


def deterministic() -> bool:
    """Transformer Engine's own rule for its attention module: its variable forbids other algorithms, or PyTorch does.

    PyTorch's warn_only counts: attention has a deterministic form, so that nothing has to be warned of.
    """
    forbidden = os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1") == "0"
    return forbidden or torch.are_deterministic_algorithms_enabled()
