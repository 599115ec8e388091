import pytest

from tests.kernels.nan_memory import nan_memory


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """Every kernel's test finds NaN where the kernel should have written."""
    with nan_memory():
        yield
