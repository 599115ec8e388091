"""Child processes that never outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
_registered = False
_forked_by_main_thread = False


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel end this process with SIGKILL when its parent ends (Linux; nothing elsewhere).

    Args:
        parent: process id of the parent, to notice that it has gone already; None takes the present one.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def children_die_with_us() -> None:
    """From now on every child that this process forks from its main thread ends with it, and so do their children.

    Checkpoint writers are forked. Left behind by a killed trainer they would go on writing into folders that the next
    one cleans up, and keep its sockets open, so that other ranks do not notice that it has died.
    """
    global _registered
    if _registered:
        return
    _registered = True
    parent = [os.getpid()]

    def before() -> None:
        global _forked_by_main_thread
        # The kernel's "parent" is the thread that forked: one that ends early would take the child with it.
        _forked_by_main_thread = threading.current_thread() is threading.main_thread()
        parent[0] = os.getpid()

    def in_child() -> None:
        if _forked_by_main_thread:
            die_with_parent(parent[0])

    os.register_at_fork(before=before, after_in_child=in_child)
