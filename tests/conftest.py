"""What holds for all tests."""

from importlib.metadata import PackageNotFoundError, version

import pytest

OTHERS = {"kvpress": ("nemo-toolkit",), "vllm": ("nemo-toolkit", "kvpress")}
"""Mark → packages whose environments do not have what the mark's tests need."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """kvpress cannot be installed beside NeMo (numpy 2 against 1), nor vLLM beside either: their tests belong to other environments.

    There they fail, rather than being skipped, when it is missing.
    """
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
