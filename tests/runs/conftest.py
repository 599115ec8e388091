"""Small models and runs, made without transformers and Megatron's own writer."""

import shutil

import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """model/ (Hugging Face), imported/ and other/ (imported), run/checkpoints/step=4 (complete): never changed."""

    from kvcat_nemo.conversion.importing import import_hf
    from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest
    from tests.runs.run_models import write_model

    root = tmp_path_factory.mktemp("made")
    write_model(root / "model")
    import_hf(root / "model", root / "imported")
    import_hf(write_model(root / "other-model", seed=1), root / "other")
    checkpoint = root / "run" / "checkpoints" / "step=4"
    shutil.copytree(root / "imported" / "weights", checkpoint / "weights")
    (checkpoint / "context").mkdir()
    (checkpoint / "context" / "io.json").write_text("{}")
    hash_and_write_manifest(checkpoint, 4, world_size=1, vocab_size=40, padded_vocab_size=40)
    return root


@pytest.fixture
def copy(made, tmp_path):
    """A private copy of one of the folders."""
    return lambda name: shutil.copytree(made / name, tmp_path / "copy" / name, symlinks=True)
