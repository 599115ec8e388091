"""Folders of small tokenizers and models, made once."""

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name of a case → folder with a small model and the case's tokenizer, made when it is asked for."""
    from tests.tokens.small_tokenizers import BY_NAME, save_model

    made = {}

    def folder(name):
        if name not in made:
            made[name] = save_model(BY_NAME[name], tmp_path_factory.mktemp("models") / name)
        return made[name]

    return folder
