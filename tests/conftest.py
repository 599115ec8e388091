"""What holds for all tests."""

import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.support.machine import ALONE, Turnstile, cpu_seconds, group_of, share_out

OTHERS = {"kvpress": ("nemo-toolkit",), "vllm": ("nemo-toolkit", "kvpress")}
"""Mark → packages whose environments do not have what the mark's tests need."""


# No test asks a hub: those of the hub's own routes set HF_ENDPOINT and this for processes of their own.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["pytester"]
# No test asks a hub: those of the hub's own routes set HF_ENDPOINT and this for processes of their own.
os.environ["HF_HUB_OFFLINE"] = "1"

_BEGAN = pytest.StashKey[float]()
_TURNSTILE = pytest.StashKey[Turnstile]()


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(
        config, "workerinput", None
    )  # a variable of the environment would reach what tests start
    if worker:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers share the cores
        folder = Path(tempfile.gettempdir()) / f"kvcat-tests-{worker['testrunuid']}"
        folder.mkdir(exist_ok=True)
        config.stash[_TURNSTILE] = Turnstile(folder)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A file's tests stay together, and so do the files of one group (tests.support.machine.group_of)."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0])

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """kvpress cannot be installed beside NeMo (numpy 2 against 1), nor vLLM beside either: their tests belong to other environments.

    There they fail, rather than being skipped, when it is missing.
    """
    if _TURNSTILE in config.stash:
        share_out(items, config.rootpath)
    for mark, packages in OTHERS.items():
        if not any(_installed(package) for package in packages):
            continue
        foreign = [item for item in items if item.get_closest_marker(mark)]
        if foreign:
            config.hook.pytest_deselected(items=foreign)
            items[:] = [item for item in items if item not in foreign]


def _installed(package: str) -> bool:
    try:
        version(package)  # not find_spec("nemo"): tests/nemo would pass for it
    except PackageNotFoundError:
        return False
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of the time-out: a test's time begins when it may run
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    turnstile = item.config.stash.get(_TURNSTILE, None)
    if turnstile is None:
        item.stash[_BEGAN] = cpu_seconds()
        return (yield)
    with turnstile.enter(alone=item.get_closest_marker(ALONE) is not None):
        item.stash[_BEGAN] = cpu_seconds()
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Every test's CPU seconds, fixtures included, stand in the JUnit file: tests/totals.py adds them up."""
    if call.when == "teardown":
        item.user_properties.append(("cpu_seconds", round(cpu_seconds() - item.stash[_BEGAN], 3)))
    return (yield)
