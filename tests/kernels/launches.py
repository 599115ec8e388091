"""Counts the operations that would be launches on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = {
    "aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default", "aten.empty_strided.default",
    "aten.new_empty_strided.default", "aten.promote_types.default", "aten._unsafe_view.default", "aten.detach.default", "aten.alias.default", "aten.lift_fresh.default",
}  # fmt: skip
"""Operations that only allocate or rename."""


class Launches(TorchDispatchMode):
    """Names of the operations inside the block that read or write numbers; `syncs`: those for which the host waits."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and str(func) not in NO_LAUNCH:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def syncs(self) -> list[str]:
        return [
            name
            for name in self.names
            if name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero"))
        ]

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Counted:
    forward: Launches
    backward: Launches


@contextmanager
def _kernels_uncounted() -> Iterator[None]:
    """The CPU's fused kernel as the CUDA ones are: without a bias for keys, and its own operations not counted."""
    from torch.utils._python_dispatch import _disable_current_modes

    from kvcat_nemo.kernels.fused.cpu import CpuKernel

    def uncounted(function):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    changed = {name: uncounted(getattr(CpuKernel, name)) for name in ("forward", "backward")}
    with mock.patch.multiple(CpuKernel, takes_key_bias=False, **changed):
        yield


def attention_launches(dtype=torch.bfloat16, **options) -> Counted:
    """What one gated attention takes beside its fused kernels."""
    from kvcat_nemo.kernels import gated_attention
    from tests.kernels.test_gated import case

    *tensors, do = case(1, 11, 4, 2, 8, dtype=dtype)
    leaves = [x.requires_grad_() for x in tensors]
    with _kernels_uncounted():
        with Launches() as forward:
            out = gated_attention(*leaves, scale=0.3, **options)
        with Launches() as backward:
            torch.autograd.grad(out, leaves, do)
    return Counted(forward, backward)
