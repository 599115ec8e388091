"""Small models and documents for the tests of serving; nothing here is downloaded."""

import sys
from pathlib import Path

import pytest

for _folder in ("compress", "tokens", "serve"):
    sys.path.insert(0, str(Path(__file__).parents[1] / _folder))  # small_tokenizers, lively


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A small model with a tokenizer that has a chat template."""
    from tests.serve.lively import save_lively

    return save_lively(tmp_path_factory.mktemp("models") / "small")
