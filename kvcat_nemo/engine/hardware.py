"""CPU or CUDA: the one module in which the two hosts differ.

Megatron-core and NeMo are written for CUDA. `enable()` lets their unchanged code run on a machine without one
(engine/compat/cpu_host.py). Where CUDA is available it changes nothing at all, so there is a single code path. Call it once per
process, before Megatron-core is imported.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
from pathlib import Path

import torch

from kvcat_nemo.engine.compat import cpu_host

_CPU = torch.device("cpu")


def is_cuda() -> bool:
    """Whether this process trains on CUDA."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that tensors of this process live on."""
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda() else _CPU


def process_group_backend() -> str:
    return "nccl" if is_cuda() else "gloo"


def peak_memory_bytes() -> int:
    """Peak bytes so far: allocated CUDA memory, or the process' peak resident set on the CPU."""
    if is_cuda():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss where there is a choice: a child process starts with its parent's.
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith("VmHWM")
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def installed(package: str) -> bool:
    """Whether a package is installed, hidden by enable() or not: what a plan for GPUs asks."""
    return package in cpu_host.hidden or importlib.util.find_spec(package) is not None


def enable() -> bool:
    """Prepare this process for Megatron-core on the host it runs on.

    Returns:
        True when the CPU stand-ins are in place, False when CUDA is there and nothing was changed.
    """
    if is_cuda():
        return False
    cpu_host.enable()
    return True
