"""Small models and runs, made without transformers and Megatron's own writer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

CONFIG = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    hidden_act="silu",
    tie_word_embeddings=True,
    torch_dtype="float32",
)


def write_model(folder, seed=0, **changes):
    """A random Llama of 16 channels as a Hugging Face folder."""
    from kvcat_nemo.conversion.arch import from_hf_config
    from kvcat_nemo.conversion.weight_map import hf_shapes

    folder.mkdir(parents=True)
    config = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    shapes = hf_shapes(from_hf_config(config))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """model/ (Hugging Face), imported/ and other/ (imported), run/checkpoints/step=4 (sealed): never changed."""
    from kvcat_nemo.conversion.importing import import_hf
    from kvcat_nemo.runs.manifest import seal

    root = tmp_path_factory.mktemp("made")
    write_model(root / "model")
    import_hf(root / "model", root / "imported")
    import_hf(write_model(root / "other-model", seed=1), root / "other")
    checkpoint = root / "run" / "checkpoints" / "step=4"
    shutil.copytree(root / "imported" / "weights", checkpoint / "weights")
    (checkpoint / "context").mkdir()
    (checkpoint / "context" / "io.json").write_text("{}")
    seal(checkpoint, 4, world_size=1, vocab_size=40, padded_vocab_size=40)
    return root


@pytest.fixture
def copy(made, tmp_path):
    """A private copy of one of the folders."""
    return lambda name: shutil.copytree(made / name, tmp_path / "copy" / name, symlinks=True)
