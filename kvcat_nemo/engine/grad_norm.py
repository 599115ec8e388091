"""Gradient norms of the backbone and of the routers apart, whatever the parallel layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from kvcat_nemo.engine.compat.gradient_buffers import owned_gradients


def gradient_norms(chunks: Iterable[DistributedDataParallel]) -> dict[str, float]:
    """L2 norms after gradients are final and before they are clipped. A collective call.

    Args:
        chunks: this rank's model chunks in Megatron's DDP wrapper.

    Returns:
        `backbone`, and `routers` (0.0 when there are none).
    """
    squares = None
    scattered = False
    for ddp in chunks:
        scattered |= ddp.ddp_config.use_distributed_optimizer
        for parameter, grad in _counted_gradients(ddp):
            if squares is None:
                squares = torch.zeros(2, dtype=torch.float64, device=grad.device)
            squares[int(getattr(parameter, "is_router", False))] += grad.double().square().sum()
    assert squares is not None
    torch.distributed.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    if scattered:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(squares, group=group)
    backbone, routers = squares.sqrt().tolist()
    return {"backbone": backbone, "routers": routers}


def _counted_gradients(ddp: DistributedDataParallel) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each parameter's gradient once over all ranks."""
    for parameter, grad in owned_gradients(ddp):
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
            yield parameter, grad
