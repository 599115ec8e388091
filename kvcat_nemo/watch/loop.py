"""Look, show, wait, until the run ends or the user has seen enough."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from kvcat_nemo.watch.state import RunWatcher, Snapshot


def follow(watcher: RunWatcher, show: Callable[[Snapshot], None], every: float) -> None:
    """Show a run every so many seconds until it is finished; Ctrl-C ends it quietly."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            run = watcher.snapshot()
            show(run)
            if run.status == "finished":
                return
            time.sleep(every)
