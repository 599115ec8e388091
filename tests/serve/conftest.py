"""Small models and documents for the tests of serving; nothing here is downloaded."""

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small model with a tokenizer that has a chat template."""
    from tests.serve.lively import save_lively

    return save_lively(tmp_path_factory.mktemp("models") / "small")
