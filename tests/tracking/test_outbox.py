"""The outbox: nothing is lost or doubled, nothing waits for the store, the queue is bounded, one warning an outage."""

import logging
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcat_nemo.tracking.outbox import BATCH, Figure, Outbox, Refused

pytestmark = pytest.mark.alone


def figure(step, name="loss"):
    return Figure(name, float(step), step, step)


class Store:
    """Takes figures; fails when told to. Its record stands for the metrics file."""

    def __init__(self, fails=()):
        self.fails = iter(fails)
        self.down = threading.Event()
        self.got: list[Figure | str] = []
        self.record: list[Figure] = []
        self.calls = 0
        self.largest = 0

    def _work(self):
        self.calls += 1
        if self.down.is_set() or next(self.fails, False):
            raise ConnectionError("http://ann:s3cret-word@host refused")

    def connect(self):
        self._work()

    def send(self, figures):
        self._work()
        self.largest = max(self.largest, len(figures))
        for f in figures:
            if f.step > max(
                (g.step for g in self.got if isinstance(g, Figure) and g.name == f.name), default=-1
            ):
                self.got.append(f)

    def catch_up(self):
        self.send(self.record)


def outbox(store, **options):
    return Outbox(store, name="MLflow", **{"first_retry": 0.01, "last_retry": 0.02} | options)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), max_size=12), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_everything_once_and_in_order(fails, sizes):
    store = Store(fails)
    box, step = outbox(store), 0
    for size in sizes:
        box.put(figure(step + i) for i in range(size))
        step += size
        box.do(lambda step=step: store.got.append(f"task {step}"))
    assert box.close(5) == 0
    assert [g.step for g in store.got if isinstance(g, Figure)] == list(range(step))
    done, figures = [], 0
    for got in store.got:
        if isinstance(got, Figure):
            figures += 1
        else:
            done.append((got, figures))
    counts = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert done == [(f"task {n}", n) for n in counts]


def test_large_batches_are_cut():
    store = Store()
    box = outbox(store)
    box.put(figure(i) for i in range(2 * BATCH + 5))
    assert box.close(5) == 0
    assert len(store.got) == 2 * BATCH + 5 and store.largest == BATCH


def test_a_dead_store_costs_no_time_and_a_bounded_queue(caplog):
    store = Store()
    store.down.set()
    box = outbox(store, limit=100)
    tasks = []
    started = time.thread_time()  # of this thread alone: other work on the machine is not its
    for step in range(2000):
        store.record.append(figure(step))
        box.put([figure(step)])
        if step in (5, 1000):
            box.do(lambda step=step: tasks.append(step))
    assert time.thread_time() - started < 0.5
    time.sleep(0.3)
    assert len(box._queue) <= 102 and not store.got
    store.down.clear()
    assert box.close(5) == 0
    assert [g.step for g in store.got] == list(range(2000))  # the dropped ones from the record
    assert tasks == [5, 1000]
    assert len(warnings(caplog)) == 1 and "s3cret-word" not in caplog.text


def test_a_slow_store_that_loses_figures_is_caught_up_too():
    class Slow(Store):
        def send(self, figures):
            time.sleep(0.05)
            super().send(figures)

    store = Slow()
    box = outbox(store, limit=10)
    for step in range(200):
        store.record.append(figure(step))
        box.put([figure(step)])
        time.sleep(0.001)
    assert box.close(60) == 0
    assert [g.step for g in store.got] == list(range(200))


def test_one_warning_an_outage(caplog):
    caplog.set_level(logging.INFO)
    store = Store()
    box = outbox(store)
    for outage in (1, 2):
        store.down.set()
        box.put([figure(10 * outage)])
        calls = store.calls
        while store.calls < calls + 6:
            time.sleep(0.01)
        store.down.clear()
        while box._queue:
            time.sleep(0.01)
    assert box.close(5) == 0
    assert len(warnings(caplog)) == 2
    assert sum("answers again" in r.getMessage() for r in caplog.records) == 2


def test_a_single_failure_is_no_outage(caplog):
    store = Store([False, True])
    box = outbox(store)
    box.put([figure(1)])
    assert box.close(5) == 0 and len(store.got) == 1 and not warnings(caplog)


HANGS = 60.0
"""Seconds for which a store does not answer: far more than a busy machine takes for anything else here."""


def test_a_hanging_store_ends_in_bounded_time():
    release = threading.Event()

    class Hangs(Store):
        def send(self, figures):
            release.wait(HANGS)

    box = outbox(Hangs())
    box.put([figure(1)])
    time.sleep(0.05)
    started = time.perf_counter()
    box.put(figure(i) for i in range(2, 1000))
    assert box.close(0.3) == 999
    assert (
        time.perf_counter() - started < HANGS / 2
    )  # what waited for the store would take as long as it hangs
    release.set()


def test_what_is_refused_does_not_block_the_rest(caplog):
    class Picky(Store):
        def send(self, figures):
            if any(f.name == "bad" for f in figures):
                raise Refused("bad name")
            super().send(figures)

    store = Picky()
    box = outbox(store)
    for step in range(1, 9):
        box.put([figure(step), figure(step, "bad"), figure(step, "other")])
    box.do(lambda: None)
    box.put([figure(9)])
    assert box.close(5) == 0
    assert [(g.name, g.step) for g in store.got if g.name == "loss"] == [("loss", s) for s in range(1, 10)]
    assert len([g for g in store.got if g.name == "other"]) == 8
    assert caplog.text.count("bad name") == 1  # not at every step


def test_closing_an_unused_one():
    assert outbox(Store()).close(1) == 0


@pytest.mark.parametrize("down", [True, False])
def test_close_gives_a_dead_store_until_the_deadline(down):
    store = Store()
    store.down.set()
    box = outbox(store, first_retry=0.05, last_retry=HANGS)
    box.put([figure(1)])
    time.sleep(0.4)  # by now it would wait long
    if not down:
        store.down.clear()
    started = time.perf_counter()
    assert box.close(1.0 if down else HANGS) == (1 if down else 0)
    assert (
        time.perf_counter() - started < HANGS / 2
    )  # neither until the next retry nor, once it is back, the deadline
