"""Heartbeats of ranks that end in good order, and of those that die."""

import os
import subprocess
import sys
import threading

import pytest

torch = pytest.importorskip("torch")

from kvcat_nemo.engine.heartbeat import Heartbeat  # noqa: E402


class LateStore:
    """A store in which a certain heartbeat arrives after what was written later by another thread."""

    def __init__(self, inner, late: str):
        self.inner, self.late = inner, late
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def set(self, key, value):
        if (key, value) == ("beat/1", self.late) and not self.began.is_set():
            self.began.set()
            assert self.may_go_on.wait(30)
        self.inner.set(key, value)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_a_last_heartbeat_does_not_take_back_that_a_rank_is_done(monkeypatch):
    """A rank stops while its thread is about to leave a sign: its process is then gone, but it did not die."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    store, ended = torch.distributed.HashStore(), []
    late = LateStore(store, "1")
    lines = [
        Heartbeat(s, rank, 2, interval=0.05, patience=0.5, end=ended.append)
        for rank, s in enumerate((store, late))
    ]
    starting = threading.Thread(target=lines[1].start)
    starting.start()
    lines[0].start()
    starting.join()
    assert late.began.wait(30)
    lines[1].stop()
    late.may_go_on.set()
    lines[1]._threads[0].join()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lines[0]._known[1] = lines[0]._known[1] | {"pid": gone.pid}
    assert lines[0]._known[1]["pid"] != os.getpid()
    # More than its patience: neither of its two ways to miss a neighbour speaks.
    lines[0]._threads[0].join(2.0)
    lines[0].stop()
    assert ended == []


def test_a_rank_that_is_gone_without_a_word_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    store, ended = torch.distributed.HashStore(), []
    lines = [Heartbeat(store, rank, 2, interval=0.05, patience=30, end=ended.append) for rank in range(2)]
    starting = threading.Thread(target=lines[1].start)
    starting.start()
    lines[0].start()
    starting.join()
    lines[1]._stopped.set()  # a process that is killed says and does nothing more
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lines[0]._known[1] = lines[0]._known[1] | {"pid": gone.pid}
    lines[0]._threads[0].join(30)
    lines[1].stop()
    assert len(ended) == 1 and ended[0].startswith("rank 1 (host") and ended[0].endswith("died")


class StoreOfAProcess:
    """A store that answers no longer once the process that holds it has ended."""

    def __init__(self, inner):
        self.inner, self.gone = inner, False

    def __getattr__(self, name):
        if self.gone:
            raise RuntimeError("connection refused")
        return getattr(self.inner, name)


@pytest.mark.parametrize("found_by", ["its thread", "a failed collective"])
def test_rank_0_keeps_its_store_until_the_others_have_read_who_died(monkeypatch, found_by):
    """Ranks 0 and 2 are left. Rank 2, on another machine, knows of rank 1's death from the store alone."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    store, ended = StoreOfAProcess(torch.distributed.HashStore()), {}

    def end_of(rank):
        def end(text):
            ended[rank] = text
            store.gone = store.gone or rank == 0

        return end

    lines = [Heartbeat(store, rank, 3, interval=0.1, patience=1.0, end=end_of(rank)) for rank in range(3)]
    monkeypatch.setattr(lines[2], "_dead_here", lambda: None)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    starting = [threading.Thread(target=line.start) for line in lines]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    lines[1]._stopped.set()  # it is killed: no word to anyone
    dead = lines[0]._known[1] | {"pid": gone.pid}
    if found_by == "its thread":
        lines[0]._known[1] = dead
        lines[0]._threads[0].join(30)
    else:
        lines[0]._stopped.set()  # its thread has no part in this
        lines[0]._threads[0].join(30)
        lines[0]._known[1] = dead
        ended[0] = lines[0].wait_for_verdict(10)
        store.gone = True
    lines[2]._threads[0].join(30)
    lines[2]._stopped.set()
    assert all(text.startswith("rank 1 (host") and text.endswith("died") for text in ended.values())
    assert set(ended) == {0, 2}
