"""What NeMo itself needs to run on a CPU host, on top of engine.hardware."""

from __future__ import annotations

from kvcat_nemo.engine import hardware


def prepare() -> None:
    """Let NeMo run on this host; nothing is changed where CUDA is available."""
    if not hardware.enable():
        return
    from kvcat_nemo.nemo.compat import load_checkpoints_without_cuda

    load_checkpoints_without_cuda()
