"""Program of test_triton_compile: python triton_compile.py CAPABILITY..., where Triton is installed and interprets nothing.

Compiles every Triton kernel of the package for a GPU that this host need not have: the functions
that launch kernels are called with tensors on the CPU, and each launch is compiled, down to machine code, but not run. So
types, divisible sizes and sizes of 1 are specialised as in training. Prints a JSON object:
capability → kernel → how many of its launches were compiled.
"""

import collections
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import KernelInterface

from kvcat_nemo.kernels.attention import columns_triton
from kvcat_nemo.kernels.losses import row_losses_triton
from kvcat_nemo.kernels.losses.token_sweep import Settings, Vocabulary


class Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # what was compiled for one is not taken for another

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def columns(dtype: torch.dtype, D: int = 128, G: int = 2, N: int = 4, T: int = 32) -> None:
    terms = 2 if dtype == torch.bfloat16 else 1
    widths = (D + 8, D + 8)
    q, do, o, far_q = (torch.zeros(2, T, G * N, width, dtype=dtype) for width in (D, D, D, D + 8))
    k, v, far_k, far_v = (torch.zeros(2, T, G, width, dtype=dtype) for width in (D, D, D + 8, D + 8))
    gate, shift = torch.zeros(2, 2, T, G)
    lse, position = torch.zeros(2, T, G * N), torch.arange(T)
    form = columns_triton
    form.query_columns(q, widths[0], terms)
    for window, by in ((1, 0.0), (4, shift)):
        beta = form.slot_columns(
            k, v, gate, position, window=window, widths=widths, terms=terms, scale=D**-0.5, shift=by
        )[2]
        sums = form.gate_sums(far_k, far_v, v, gate, window=window, D=D, terms=terms, scale=D**-0.5)
    delta = form.gradient_columns(do, o, widths[1], terms)[1]
    form.gate_gradient(sums, beta, gate, position[None] < 1, 3.0, N)
    merged_lse, own = form.merge_own(q, k, v, o.float(), lse, D**-0.5)[1:]
    form.own_gradients(do, delta, q, k, v, merged_lse, own, D**-0.5)
    form.own_and_gated_gradients(do, delta, q, k, v, merged_lse, own, D**-0.5, (far_q, far_k, far_v), gate)


def row_losses(dtype: torch.dtype, V: int = 8192) -> None:
    labels = torch.zeros(2, dtype=torch.long)
    for paired, temperature, share in ((True, 1.0, 1.0), (True, 2.0, 0.5), (False, 1.0, 1.0)):
        x, y = torch.zeros(2, 2, V, dtype=dtype)
        s = Settings(Vocabulary(None, False, 0, V), paired, temperature, share, 1 << 20)
        out, weights = torch.zeros(4 if paired else 1, 2), torch.ones(1 + paired, 2)
        row_losses_triton.row_losses(x, y if paired else None, labels, weights, s, out)


def main(*capabilities: int) -> None:
    compiled = {capability: collections.Counter() for capability in capabilities}

    def launch(kernel, grid):
        def compile_alone(*args, **options):
            binary = kernel.run(*args, grid=grid, warmup=True, **options)
            assert binary.metadata.target.arch == capability and len(binary.asm["cubin"]) > 0
            compiled[capability][kernel.__name__] += 1

        return compile_alone

    KernelInterface.__getitem__ = launch
    for capability in capabilities:
        triton.runtime.driver.set_active(Driver(capability))
        for dtype in (torch.bfloat16, torch.float32):
            columns(dtype)
            row_losses(dtype)
    print(json.dumps(compiled))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
