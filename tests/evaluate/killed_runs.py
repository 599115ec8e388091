"""What the tests of kills run in another process, and how they kill it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

from kvcat_nemo.evaluate.results import Store
from kvcat_nemo.evaluate.sweep import load_sweep


def _slowly() -> None:
    """A pause after each item, so that the test can choose the moment of the kill."""
    put = Store.put

    def slow(self, *args):
        put(self, *args)
        time.sleep(0.05)

    Store.put = slow


def run_protocol(settings, protocol="continuation"):
    from kvcat_nemo.evaluate.registry import protocol_class

    _slowly()
    protocol_class(protocol).of(settings).run()


def run_sweep(path):
    _slowly()
    for run in load_sweep(path).values():
        run.run()


def measured(folder) -> int:
    """Items on disk, in all results folders in there."""
    return sum(len(p.read_bytes().splitlines()) - 1 for p in folder.glob("**/items/*.jsonl"))


def kill_after(items, folder, function, *arguments) -> None:
    """Run a function of this file in a process of its own, and kill it when so many items are on disk."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kvcat_nemo.evaluate.continuation"])  # the imports are paid for once
    child = context.Process(target=function, args=arguments)
    child.start()
    end = time.monotonic() + 300
    while measured(folder) < items:
        assert child.is_alive() and time.monotonic() < end
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL
