"""Unwritten memory is NaN in these tests, backward passes included."""

import pytest
import torch

from tests.kernels.nan_memory import nan_memory

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unwritten_numbers_are_nan(dtype):
    x = torch.ones(3, dtype=dtype)
    assert torch.empty(3, dtype=dtype).isnan().all()
    assert torch.empty_like(x).isnan().all() and x.new_empty(2, 2).isnan().all()
    assert torch.empty(3, dtype=torch.int64).tolist() == [-1, -1, -1]


def test_a_kernel_that_forgets_a_row_is_seen():
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            out = torch.empty_like(x)
            out[:-1] = x[:-1]
            return out

        @staticmethod
        def backward(ctx, grad):
            out = torch.empty_like(grad)
            out[1:] = grad[1:]
            return out

    x = torch.ones(4, 2, requires_grad=True)
    y = Forgetful.apply(x)
    y.sum().backward()
    assert y[-1].isnan().all() and x.grad[0].isnan().all()
    assert y[:-1].isfinite().all() and x.grad[1:].isfinite().all()


def test_nothing_is_counted_as_an_operation():
    from tests.kernels.launches import Launches

    with Launches() as counted, nan_memory():
        torch.empty(4)
    assert len(counted) == 0
