"""What holds for all tests."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest

# No test asks a hub: those of the hub's own routes set HF_ENDPOINT and this for processes of their own.
os.environ["HF_HUB_OFFLINE"] = "1"


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
