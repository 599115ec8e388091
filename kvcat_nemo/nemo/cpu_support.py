"""What NeMo itself needs to run on a CPU host, on top of engine.hardware."""

from __future__ import annotations

from kvcat_nemo.engine import hardware


def prepare() -> None:
    """Let NeMo run on this host; nothing is changed where CUDA is available."""
    if not hardware.enable():
        return
    import nemo.lightning.io.pl as checkpoint_io

    # It asserts an initialised CUDA context before it moves loaded tensors between CUDA devices.
    checkpoint_io._fix_tensors_device = lambda checkpoint: checkpoint
