"""A small random model whose answers depend on what it read, with a tokenizer; also for engines (head size 32)."""

from __future__ import annotations

from pathlib import Path


def save_lively(folder: Path, *, seed: int = 0, case: str = "plain", **sizes) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tokens.small_tokenizers import BY_NAME, save_tokenizer

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 380,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.1,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **sizes,
        }
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 3
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_tokenizer(BY_NAME[case], folder)
    return folder
