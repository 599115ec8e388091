"""Heartbeats between ranks: the ranks that are left name the one that died, within a bounded time.

A collective over a dead rank fails with an address at best, and waits for half an hour at worst. Each rank therefore
counts up in the job's store, watches its neighbour's counter, and tells all others when that stands still. Plain torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch

from kvcat_nemo.runs.exit_codes import PEER_DIED as EXIT_PEER_DIED


class Heartbeat:
    """One rank's heartbeat, and its watch over the next rank's.

    Args:
        store: a connection of its own to the job's store (`connect`): its calls may block.
        rank, world_size: this process' place.
        interval: seconds between heartbeats; patience: seconds without one after which a rank counts as dead.
        end: called with the message when another rank is dead; by default it ends this process with code 69.
    """

    def __init__(
        self,
        store: torch.distributed.Store,
        rank: int,
        world_size: int,
        *,
        interval: float = 5.0,
        patience: float = 60.0,
        end: Callable[[str], None] | None = None,
    ):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.interval, self.patience = interval, patience
        self._end = end or _end_process
        self._stopped = threading.Event()
        # Time is counted in this process' own rounds: one that was itself held up (a busy or suspended machine) has
        # no right to call others late.
        self._rounds = max(2, round(patience / interval))
        self._unanswered = 0
        self._verdict: str | None = None
        self._known: dict[int, dict] = {}
        self._threads = [
            threading.Thread(target=self._beat, name="kvcat-heartbeat", daemon=True),
            threading.Thread(target=self._watch_store, name="kvcat-heartbeat-store", daemon=True),
        ]

    def start(self) -> None:
        """Make this rank known and begin. Call it on every rank."""
        self.store.set(f"who/{self.rank}", json.dumps(_who()))
        self._learn_names()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """This rank ends in good order: nobody is to miss it."""
        self._stopped.set()
        with contextlib.suppress(Exception):
            # A key of its own: a heartbeat that is under way would overwrite it.
            self.store.set(f"done/{self.rank}", "")

    def report_own_failure(self, error: BaseException) -> None:
        """Tell the others why this rank is about to end."""
        text = f"{self._name(self.rank)} failed: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            self._announce(text)
        self._stopped.set()
        self._let_others_read()

    def wait_for_verdict(self, seconds: float) -> str | None:
        """After a collective failed: what is known, or becomes known in time, about who died."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._verdict is None:
            with contextlib.suppress(Exception):
                if (dead := self._dead_here()) is not None:
                    self._announce(f"{self._name(dead)} died")
                if self.store.check(["dead"]):
                    self._verdict = _text(self.store.get("dead"))
            time.sleep(min(0.2, self.interval))
        if self._verdict is not None:
            self._let_others_read()
        return self._verdict

    # --- threads ---

    def _beat(self) -> None:
        neighbour = (self.rank + 1) % self.world_size
        count, seen, silent = 0, b"", 0
        while not self._stopped.wait(self.interval):
            count += 1
            try:
                self.store.set(f"beat/{self.rank}", str(count))
                if self.store.check(["dead"]):
                    text = _text(self.store.get("dead"))  # now: rank 0's store may be gone after the wait
                    # What failed there may be failing here too, with an error of its own that says more.
                    self._stopped.wait(2 * self.interval)
                    self._judge(text)
                    return
                now = self.store.get(f"beat/{neighbour}") if self.store.check([f"beat/{neighbour}"]) else b""
                done = self.store.check([f"done/{neighbour}"])
                self._unanswered = 0
                if (dead := self._dead_here()) is not None:
                    text = f"{self._name(dead)} died"
                    self._announce(text)
                    self._judge(text)
                    return
            except Exception:  # the store's side is judged by the other thread
                continue
            silent += 1
            if now != seen or done:
                seen, silent = now, 0
            elif silent > self._rounds:
                text = f"{self._name(neighbour)} died or hangs: no heartbeat for {self.patience:g} s"
                with contextlib.suppress(Exception):
                    self._announce(text)
                self._judge(text)
                return

    def _watch_store(self) -> None:
        # A store whose host is stopped does not answer at all: the other thread is then stuck in a call.
        while not self._stopped.wait(self.interval):
            self._unanswered += 1
            if self._unanswered > self._rounds + 2:
                self._judge(
                    f"the job's store has not answered for {self.patience:g} s: {self._name(0)}, which holds it unless "
                    "torchrun does, died or cannot be reached"
                )
                return

    def _judge(self, text: str) -> None:
        if self._verdict is None and not self._stopped.is_set():
            self._verdict = text
            self._let_others_read()
            self._end(text)

    def _let_others_read(self) -> None:
        """The store may end with rank 0's process: before that, the others come round to read what was announced."""
        if self.rank == 0:
            time.sleep(2.5 * self.interval)

    def _announce(self, text: str) -> None:
        """The first announcement stands."""
        self.store.compare_set("dead", "", text)

    def _dead_here(self) -> int | None:
        """A rank of this machine whose process is gone: seen at once, where another machine's takes `patience`."""
        me = _who()
        for rank in self._neighbours():
            who = self._known.get(rank)
            if who is None or (who["host"], who["pids"]) != (me["host"], me["pids"]) or _lives(who["pid"]):
                continue
            if not self.store.check([f"done/{rank}"]):
                return rank
        return None

    def _neighbours(self) -> range:
        """The ranks that a launcher has put on this machine."""
        count, place = (
            int(os.environ.get(n, d)) for n, d in (("LOCAL_WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        first = max(0, self.rank - place)
        return range(first, min(first + count, self.world_size))

    def _name(self, rank: int) -> str:
        with contextlib.suppress(Exception):
            if rank not in self._known and self.store.check([f"who/{rank}"]):
                self._known[rank] = json.loads(self.store.get(f"who/{rank}"))
        who = self._known.get(rank)
        return f"rank {rank} ({'host {host}, process {pid}'.format(**who) if who else 'host unknown'})"

    def _learn_names(self) -> None:
        """Ask who the others are while the store answers: those that this rank may have to name."""
        wanted = {0, (self.rank + 1) % self.world_size, *self._neighbours()}
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline and (wanted := {r for r in wanted if r not in self._known}):
            for rank in wanted:
                self._name(rank)
            time.sleep(0.05)


def _who() -> dict:
    """Host, process id, and the name space in which it is one (containers of a host may share its name)."""
    try:
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        pids = f"unknown to {os.getpid()}"
    return {"host": socket.gethostname(), "pid": os.getpid(), "pids": pids}


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _end_process(text: str) -> None:
    # The main thread may be inside a collective that never returns: it is not asked.
    print(f"kvcat: {text}. This rank ends (exit code {EXIT_PEER_DIED}).", file=sys.stderr, flush=True)
    os._exit(EXIT_PEER_DIED)


def connect(patience: float = 60.0) -> torch.distributed.Store:
    """A connection of its own to the store that this job's process group began with (MASTER_ADDR, MASTER_PORT).

    Keys are kept apart by torchrun's restart count: a restarted job must not read its former life's.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience)
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"kvcat-heartbeat/{attempt}", store)


def is_communication_error(error: BaseException) -> bool:
    """Whether an exception says that another rank could not be reached, rather than that something failed here."""
    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "nccl", "connection", "peer", "timed out", "timeout", "broken pipe", "socket")
    return isinstance(error, RuntimeError | OSError) and any(w in str(error).lower() for w in words)
