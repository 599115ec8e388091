"""Where each parameter's gradient lies in Megatron's gradient buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from megatron.core.distributed import DistributedDataParallel, param_and_grad_buffer

from kvcat_nemo.engine.compat import MEGATRON

_WHY = "tell which part of a gradient a rank owns"
_Buffer = MEGATRON.reach(param_and_grad_buffer, "_ParamAndGradBuffer", _WHY)
MEGATRON.reach(_Buffer, "__init__", _WHY, takes=("data_parallel_group", "params"))


class Place(NamedTuple):
    """A parameter's elements in its buffer, `start` … `end` − 1, and the number of their bucket."""

    start: int
    end: int
    bucket: int


def places(buffer) -> dict[torch.nn.Parameter, Place]:
    """All parameters of a buffer, in its map's order."""
    try:
        return {parameter: Place(*place) for parameter, place in buffer.param_index_map.items()}
    except TypeError as error:
        raise MEGATRON.other("param_index_map", f"has another form ({error})", _WHY) from error


def owned_gradients(ddp: DistributedDataParallel) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter's flat gradient, where the optimizer is distributed this rank's part of it."""
    for buffer in ddp.buffers:
        ranks, rank = buffer.data_parallel_world_size, buffer.data_parallel_group.rank()
        for parameter, place in places(buffer).items():
            grad = parameter.main_grad.flatten()
            if ddp.ddp_config.use_distributed_optimizer:
                # After the reduce-scatter only this rank's equal share of each bucket is summed.
                bucket = buffer.buckets[place.bucket]
                share = bucket.grad_data.numel() // ranks
                first = bucket.offset + rank * share - place.start
                grad = grad[max(first, 0) : max(min(first + share, place.end - place.start), 0)]
            yield parameter, grad


def places_without_padding(buffer) -> dict[torch.nn.Parameter, Place]:
    """As `places`, but in the buckets' unpadded contents, one after the other."""
    begins, at = [], 0
    for bucket in buffer.buckets:
        begins.append(at - bucket.offset)
        at += bucket.numel_unpadded
    return {
        parameter: Place(start + begins[bucket], end + begins[bucket], bucket)
        for parameter, (start, end, bucket) in places(buffer).items()
    }
