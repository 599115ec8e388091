"""What holds for all tests."""

from importlib.metadata import PackageNotFoundError, version

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """kvpress cannot be installed beside NeMo (numpy 2 against 1): its tests belong to the other environment.

    There they fail, rather than being skipped, when it is missing.
    """
    try:
        version("nemo-toolkit")  # not find_spec("nemo"): tests/nemo would pass for it
    except PackageNotFoundError:
        return
    foreign = [item for item in items if item.get_closest_marker("kvpress")]
    if foreign:
        config.hook.pytest_deselected(items=foreign)
        items[:] = [item for item in items if item not in foreign]
