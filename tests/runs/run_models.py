"""A small Llama, made without transformers."""

import json

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
