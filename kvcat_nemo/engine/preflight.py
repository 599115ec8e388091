"""The check before a job starts: a sum over all ranks with a time limit, and the names of those that do not answer.

Needs torch alone, so that a launcher can ask before it starts anything heavy.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch


@dataclass(frozen=True)
class Place:
    """Where a launcher put this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    agent_store: bool
    """torchrun's agent holds the store; otherwise rank 0 does."""


class RanksMissing(ValueError):
    """This rank is there; the ones that the message names are not."""


def place_from_environment() -> Place | None:
    """This process' place, from torchrun's variables or from Slurm's; None outside of a job of several processes.

    Raises:
        ValueError: naming the variable that is missing or no number.
    """
    slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}

    def number(name: str, default: int | None = None) -> int:
        text = os.environ.get(name) or (
            os.environ.get(slurm.get(name, ""), "") if "SLURM_PROCID" in os.environ else ""
        )
        if not text:
            if default is None:
                raise ValueError(f"WORLD_SIZE is set, but {name} is not: set both, or start with torchrun")
            return default
        if not text.isdigit():
            raise ValueError(f"{name}={text!r} is no number")
        return int(text)

    world = number("WORLD_SIZE", 1)
    if world == 1:
        return None
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise ValueError(
            "WORLD_SIZE is set, but MASTER_ADDR is not: give the host of rank 0, or start with torchrun"
        )
    return Place(
        rank=number("RANK"),
        world_size=world,
        local_rank=number("LOCAL_RANK", 0),
        local_world_size=number("LOCAL_WORLD_SIZE", 1),
        address=address,
        port=number("MASTER_PORT", 29500),
        agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true",
    )


def check_all_ranks(place: Place, *, seconds: float = 60.0, backends: Sequence[str] = ("gloo",)) -> str:
    """Sum the ranks' numbers over all ranks.

    Args:
        seconds: limit for each backend; backends: gloo, and nccl on CUDA devices.

    Returns:
        one line on what answered.

    Raises:
        RanksMissing: naming the ranks and hosts that did not answer in time, and where they hang.
        ValueError: when it did not work out for another reason.
    """
    here = socket.gethostname()
    try:
        store = torch.distributed.TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0 and not place.agent_store,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
    except (RuntimeError, torch.distributed.DistError) as error:
        if place.rank == 0 and not place.agent_store:
            raise ValueError(f"host {here}: port {place.port} cannot be opened: {error}") from None
        raise ValueError(
            f"rank 0 does not answer at {place.address}:{place.port} within {seconds:g} s (asked by rank {place.rank}, host {here})"
        ) from None
    answers = []
    store = torch.distributed.PrefixStore(
        f"kvcat-doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
    )
    try:
        for backend in backends:
            part = torch.distributed.PrefixStore(backend, store)
            answers.append(_sum_over(part, place, time.monotonic() + seconds, seconds, backend))
        store.add("gone", 1)
        return "; ".join(answers)
    except (RuntimeError, torch.distributed.DistError) as error:
        raise ValueError(
            f"the job's store at {place.address}:{place.port} went away: its holder (rank 0, or torchrun's agent) ended ({error})"
        ) from None
    finally:
        if place.rank == 0 and not place.agent_store:
            _outlast_the_others(store, place)


def _sum_over(store, place: Place, deadline: float, seconds: float, backend: str) -> str:
    here = socket.gethostname()

    def left() -> timedelta:
        return timedelta(seconds=max(0.1, deadline - time.monotonic()))

    _sign(store, "here", place, here)
    _await(store, "here", "did not start", place, deadline, seconds)
    failure: Exception | None = None
    try:
        torch.distributed.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.world_size, timeout=left()
        )
        number = torch.tensor(
            [place.rank + 1.0], device=f"cuda:{place.local_rank}" if backend == "nccl" else "cpu"
        )
        torch.distributed.all_reduce(number, async_op=True).wait(timeout=left())
        if float(number.item()) != place.world_size * (place.world_size + 1) / 2:
            failure = ValueError(f"the sum is {float(number.item())}")
    except (RuntimeError, torch.distributed.DistError) as error:
        failure = error
    # One that returned, with an error or without, answers; one that hangs does not.
    _sign(store, "back", place, here)
    _await(store, "back", f"did not come back from the {backend} all-reduce", place, deadline + 5, seconds)
    if failure is not None:
        raise ValueError(f"{backend} all-reduce failed on rank {place.rank} (host {here}): {failure}")
    hosts = sorted({_read(store, f"here/{r}") for r in range(place.world_size)})
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
    listed = ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")
    return f"{place.world_size} ranks on {len(hosts)} host(s) ({listed}) over {backend}"


def _sign(store, what: str, place: Place, host: str) -> None:
    store.set(f"{what}/{place.rank}", host)
    store.add(what, 1)  # a thousand ranks that wait ask for one number, not for a thousand keys


def _read(store, key: str) -> str:
    value = store.get(key)
    return value.decode() if isinstance(value, bytes) else value


def _await(store, what: str, verb: str, place: Place, deadline: float, seconds: float) -> None:
    """Wait until every rank has set its key, or raise with the names of those that have not."""
    while store.add(what, 0) < place.world_size:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    else:
        return
    missing = [r for r in range(place.world_size) if not store.check([f"{what}/{r}"])]
    hosts = {r: _read(store, f"here/{r}") for r in range(place.world_size) if store.check([f"here/{r}"])}
    known = os.environ.get("KVCAT_NODE_NAMES", "").split()  # by a launcher of one node after the other
    nodes = dict(enumerate(known)) if len(known) * place.local_world_size == place.world_size else {}
    nodes |= {r // place.local_world_size: name for r, name in hosts.items()}

    def name(r: int) -> str:
        node = r // place.local_world_size
        return f"rank {r} (host {hosts.get(r) or nodes.get(node) or f'of node {node}, not known'})"

    listed = ", ".join(map(name, missing[:16])) + (" and more" if len(missing) > 16 else "")
    raise RanksMissing(f"{listed} {verb} within {seconds:g} s")


def _outlast_the_others(store, place: Place) -> None:
    """The store ends with this process: give the others the time to read it."""
    until = time.monotonic() + 5
    with contextlib.suppress(Exception):
        while time.monotonic() < until:
            if store.add("gone", 0) >= place.world_size:
                return
            time.sleep(0.05)
