"""Decisions that all ranks take together, and acts of one rank whose failure all of them learn of."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch

from kvcat_nemo.engine import hardware


class AllRanksError(RuntimeError):
    """Something failed on one rank, and every rank raised this with the same text."""


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def whoami() -> str:
    """How messages name this process: its rank and host."""
    return f"rank {rank()} (host {socket.gethostname()})"


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. A collective call."""
    if world_size() == 1:
        return flag
    answer = torch.tensor([int(flag)], dtype=torch.int32, device=hardware.device())
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
    return bool(answer.item())


def sum_over_ranks(number: int, group=None) -> int:
    """Sum of 64-bit integers with wrap-around. A collective call of the group (None: all ranks)."""
    total = torch.tensor([number], dtype=torch.int64, device=hardware.device())
    if world_size() > 1:
        torch.distributed.all_reduce(total, group=group)
    return int(total.item())


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks. A collective call; small plain values only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_first_rank(act: Callable[[], Any]) -> Any:
    """Run `act` on rank 0 and give every rank its result. A collective call.

    Raises:
        AllRanksError: on every rank, when it raised an OSError or ValueError on rank 0.
    """
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = act()
        except (OSError, ValueError) as error:
            answer[1] = f"{type(error).__name__}: {error}"
    if world_size() > 1:
        torch.distributed.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise AllRanksError(answer[1])
    return answer[0]
