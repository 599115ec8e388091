"""Small models as folders, and the compressors' test models."""

import pytest


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    from tests.support.hf_models import save_model

    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory):
    from tests.support.hf_models import save_model

    return save_model(tmp_path_factory.mktemp("models") / "other", seed=1)
