"""How the tests share a machine: which of them run one after another, which run alone, and what each part may cost.

`make test` runs two workers (pytest-xdist). A file is run by one worker, so that its fixtures are made once. Files whose tests
start several processes are one group, on one worker: two of them at once would starve each other. Tests marked `alone` compare
the clock with a bound; they come last, and no other test runs beside them.

Costs are CPU seconds, those of child processes included: they hardly change when the machine is busy, as wall time does.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

PROCESSES, ALONE = "processes", "alone"

BUDGETS = {
    "tests": 180,
    "tests/benchmarks": 200,
    "tests/compress": 150,
    "tests/conversion": 120,
    "tests/data": 90,
    "tests/engine": 600,
    "tests/evaluate": 200,
    "tests/kernels": 400,
    "tests/launch": 150,
    "tests/method": 30,
    "tests/models": 60,
    "tests/nemo": 640,
    "tests/recipes": 30,
    "tests/registry_assets": 90,
    "tests/runs": 60,
    "tests/serve": 30,
    "tests/tokens": 30,
    "tests/tracking": 120,
    "tests/watch": 30,
}
"""Part → CPU seconds that its tests may take in one environment; CONTRIBUTING.md has the same table."""
FAR = 1.5
"""`make test` names a part that takes more than so many times its budget."""


def part_of(file: str) -> str:
    """tests/engine/test_model.py → tests/engine; tests/test_cli.py → tests."""
    parts = Path(file).parts
    return "/".join(parts[:2]) if len(parts) > 2 else parts[0]


@functools.cache
def group_of(file: Path) -> str:
    """The group of a file of tests: all those whose tests start several processes are one.

    Told from the file's text: the process that hands out tests has collected none.
    """
    several = re.search(r"\bmark\.(multiprocess|slurm)\b", file.read_text(encoding="utf-8"))
    return PROCESSES if several else str(file)


def share_out(items: list[pytest.Item], root: Path) -> None:
    """Put the tests in the order in which workers are to take them.

    The long group comes first, then parts by their budget: whoever is free takes what is left. Files with an `alone` are last.
    """
    alone = {item.path for item in items if item.get_closest_marker(ALONE)}
    places = {}
    for number, item in enumerate(items):
        first = 0 if group_of(item.path) == PROCESSES else 2 if item.path in alone else 1
        places[item] = (first, -BUDGETS.get(part_of(str(item.path.relative_to(root))), 0), number)
    items.sort(key=places.__getitem__)


class Turnstile:
    """Tests of several workers: any number beside one another, or one alone.

    Two locks of files. Who wants to be alone holds the first while it waits for the second; the others pass through the first,
    so that they queue behind whoever waits.
    """

    def __init__(self, folder: Path):
        self._door, self._room = (folder / name for name in ("door.lock", "room.lock"))

    @contextlib.contextmanager
    def enter(self, alone: bool) -> Iterator[None]:
        with self._door.open("w") as door, self._room.open("w") as room:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(door, fcntl.LOCK_UN)
            yield  # closing a file gives its lock back


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    mine, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime
