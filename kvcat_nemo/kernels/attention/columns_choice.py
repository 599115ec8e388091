"""Which form of kernels/attention/columns.py serves a device: Triton's on CUDA where a small case agrees, else PyTorch's."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

from kvcat_nemo.kernels.attention import columns

logger = logging.getLogger("kvcat_nemo.attention")


@functools.cache
def columns_for(device: torch.device) -> ModuleType:
    """The module whose functions build columns on `device`. Says once why Triton's are not used on a CUDA device."""
    if device.type != "cuda":
        return columns
    try:
        from kvcat_nemo.kernels.attention import columns_triton
    except ImportError as error:
        why = f"Triton is not installed ({error})"
    else:
        why = columns_triton.failure(device)
        if not why:
            return columns_triton
    logger.warning("gated attention's columns by PyTorch's operations, not by Triton, on %s: %s", device, why)
    return columns
