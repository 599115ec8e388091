"""Figures leave a training process in the background: a store that hangs or dies costs the training no time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcat_nemo.common.redact import redact

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figure:
    """One value of one metric."""

    name: str
    value: float
    step: int | None
    """None: the step after the metric's last."""
    milliseconds: int
    """Since 1970. The store tells by it whether it has this very value already, so it must not change on a retry."""


class Refused(Exception):
    """The store answered and will never take this: sending it again is of no use."""


class Sink(Protocol):
    """What an outbox sends to. Each method may raise: Refused, or anything else for "try again later"."""

    def connect(self) -> None:
        """Reach the store; called before the first sending and after a failure."""

    def send(self, figures: Sequence[Figure]) -> None:
        """Store the figures, at most `BATCH`."""

    def catch_up(self) -> None:
        """Store what the outbox had to drop, from the record on disk."""


Task = Callable[[], None]
BATCH = 1000  # MLflow takes no more metrics in one request


class Outbox:
    """A bounded queue and the thread that empties it, in order.

    Args:
        sink: see `Sink`; called from the thread alone.
        limit: figures kept while the sink fails; beyond it the oldest are dropped, and caught up with afterwards.
        first_retry, last_retry: seconds between attempts; the wait doubles from the first to the last.
        name: of the store, for messages.

    What a sink raises is reported once per outage, after the second attempt failed.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        name: str,
        limit: int = 100_000,
        first_retry: float = 1.0,
        last_retry: float = 60.0,
    ):
        self._sink, self._name, self._limit = sink, name, limit
        self._retries = (first_retry, last_retry)
        self._queue: deque[Figure | Task] = deque()
        self._figures = 0  # in the queue
        self._refused: set[str] = set()
        self._dropped = self._dropped_ever = 0
        self._wake = threading.Condition()
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None

    def put(self, figures: Iterable[Figure]) -> None:
        """Queue figures. Never waits for the store."""
        with self._wake:
            for figure in figures:
                self._queue.append(figure)
                self._figures += 1
            while self._figures > self._limit:
                self._drop_oldest()
            self._start()

    def do(self, task: Task) -> None:
        """Queue something else to be done with the store, in order with the figures; it is never dropped."""
        with self._wake:
            self._queue.append(task)
            self._start()

    def close(self, seconds: float) -> int:
        """Send what is left for at most so many seconds, then stop. Returns how many things were not sent."""
        with self._wake:
            if self._thread is None:
                return 0
            self._deadline = time.monotonic() + seconds
            self._wake.notify_all()
        self._thread.join(seconds + 0.5)  # a request that hangs is left to the daemon thread
        with self._wake:
            left = len(self._queue) + self._dropped
            self._queue.clear()
            self._figures = 0
        return left

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvcat-outbox", daemon=True)
            self._thread.start()
        self._wake.notify_all()

    def _drop_oldest(self) -> None:
        kept: list[Task] = []
        while not isinstance(item := self._queue.popleft(), Figure):
            kept.append(item)
        self._queue.extendleft(reversed(kept))
        self._figures -= 1
        self._dropped += 1
        self._dropped_ever += 1

    # --- the thread ---

    def _run(self) -> None:
        connected, failures = False, 0
        while self._wait_for_work():
            try:
                if not connected:
                    self._sink.connect()
                    connected = True
                if dropped := self._dropped:
                    self._sink.catch_up()
                    with self._wake:
                        self._dropped -= dropped
                self._deliver()
            except Exception as error:  # whatever a store raises must not end a training run
                connected, failures = False, failures + 1
                if failures == 2:
                    _log.warning(
                        "%s does not answer; training goes on, figures are kept and sent when it does: %s",
                        self._name,
                        redact(f"{type(error).__name__}: {error}"),
                    )
                if not self._pause(failures):
                    return
            else:
                if failures > 1:
                    _log.info("%s answers again", self._name)
                failures = 0

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._queue:
                if self._deadline is not None:
                    return False
                self._wake.wait()
            return self._deadline is None or time.monotonic() < self._deadline

    def _pause(self, failures: int) -> bool:
        first, last = self._retries
        until = time.monotonic() + min(first * 2 ** (failures - 1), last)
        with self._wake:
            while (now := time.monotonic()) < until:
                if self._deadline is not None:
                    until = min(until, now + first)  # closing: no long waits any more
                    if now >= self._deadline:
                        return False
                self._wake.wait(min(until - now, first))
        return True

    def _deliver(self) -> None:
        """The task at the queue's head, or the figures there; they leave the queue when the sink has them."""
        with self._wake:
            head = self._queue[0]
            batch: list[Figure] = []
            for item in self._queue:
                if not isinstance(item, Figure) or len(batch) == BATCH:
                    break
                batch.append(item)
            dropped = self._dropped_ever
        if batch:
            self._send(batch)
        else:
            try:
                head()
            except Refused as error:
                self._say_refused("a task", error)
        with self._wake:
            # Meanwhile the oldest may have been dropped: then less of the batch is still at the head.
            gone = max(len(batch) - (self._dropped_ever - dropped), 0) if batch else 1
            for _ in range(gone):
                item = self._queue.popleft()
                if isinstance(item, Figure):
                    self._figures -= 1

    def _send(self, batch: Sequence[Figure]) -> None:
        """Send figures; of those that are refused together, each that the store takes alone still gets there."""
        try:
            self._sink.send(batch)
        except Refused as error:
            if len(batch) == 1:
                self._say_refused(batch[0].name, error)
                return
            middle = len(batch) // 2
            self._send(batch[:middle])
            self._send(batch[middle:])

    def _say_refused(self, what: str, error: Refused) -> None:
        if what not in self._refused:  # a metric comes back at every step
            self._refused.add(what)
            _log.warning("%s refused %r: %s", self._name, what, redact(str(error)))
