"""Small models as folders, and the compressors' test models."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "compress"))  # hf_models


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    from model_folders import save_model

    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory):
    from model_folders import save_model

    return save_model(tmp_path_factory.mktemp("models") / "other", seed=1)
