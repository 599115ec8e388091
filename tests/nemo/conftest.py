"""A base model of kvcat_tiny's shape, made once."""

import pytest
import torch


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random Qwen2 of kvcat_tiny's shape, as a Hugging Face folder and converted."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from kvcat_nemo.conversion.importing import import_hf

    root = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # zero biases would hide a dropped one
    model.save_pretrained(root / "hf")
    return root / "hf", import_hf(root / "hf", root / "megatron")
