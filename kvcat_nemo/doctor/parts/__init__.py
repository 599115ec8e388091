"""The parts of `kvcat train doctor --gpu`, one file each. Each yields its checks as they are done, on a GPU or, for the tests, on the CPU.

On CUDA a part compares the GPU with the CPU in float32, or with transformers, or with itself; on the CPU the same functions run
with small shapes, where only the launch of GPU kernels is missing. kvcat_nemo.doctor.gpu says what each part needs.
"""

from kvcat_nemo.doctor.parts import (
    converted,
    kernels,
    losses,
    megatron,
    nemo,
    parallel,
    reshard,
    resume,
    step,
)
from kvcat_nemo.doctor.parts.host import Host

__all__ = ["CHECKS", "Host"]

CHECKS = {
    module.__name__.rpartition(".")[2]: module.checks
    for module in (kernels, losses, megatron, nemo, converted, resume, step, parallel, reshard)
}
"""Name of a part → its checks."""
