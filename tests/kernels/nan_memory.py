"""Memory that torch.empty and its like give out is filled with NaN, so that a kernel that leaves a number unwritten is seen."""

import contextlib
import ctypes
import functools
from unittest import mock

import torch

UNFILLED = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _filled(allocate):
    @functools.wraps(allocate)
    def allocate_nan(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if out.device.type == "cpu" and out.numel():
            ctypes.memset(out.data_ptr(), 0xFF, out.untyped_storage().nbytes())
        elif out.device.type == "cuda":
            out.untyped_storage().fill_(0xFF)
        return out

    return allocate_nan


@contextlib.contextmanager
def nan_memory():
    """While it lasts, such a tensor's every byte is 0xFF: NaN in all floating-point types, −1 in whole numbers.

    Functions are replaced, since a TorchFunctionMode does not act in backward. On a CPU no operation of torch's is counted for it
    (launches.py).
    """
    with contextlib.ExitStack() as stack:
        for holder, name in UNFILLED:
            stack.enter_context(mock.patch.object(holder, name, _filled(getattr(holder, name))))
        yield
