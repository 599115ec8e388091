from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory):
    """Name → Hugging Face folder of every small model; tests that change one copy it first."""
    from tests.conversion import conversion_models

    root = tmp_path_factory.mktemp("hf")
    return {name: conversion_models.build(name, root / name) for name in conversion_models.CONFIGS}


@pytest.fixture(scope="session")
def imported(hf_models, tmp_path_factory):
    """Name → imported Megatron folder."""
    from kvcat_nemo.conversion.importing import import_hf

    root = tmp_path_factory.mktemp("megatron")
    return {name: import_hf(folder, root / name) for name, folder in hf_models.items()}


@pytest.fixture
def copy_of(hf_models, tmp_path):
    """A private copy of a small model."""
    import shutil

    return lambda name: Path(shutil.copytree(hf_models[name], tmp_path / f"copy-{name}"))
