"""Small random models and tokenizers of bytes, for tests and for the smallest form of benchmarks: nothing is downloaded.

tests/models/tiny_models.py and tests/conversion/conversion_models.py make one for each form of config.json and for each feature that
a conversion can get wrong; tests/engine/small_models.py makes Megatron's.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def small_model(kind: str = "llama", *, dtype=torch.float32, seed: int = 0, **sizes):
    """A random model of the given architecture whose attention is far from even."""
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind](**{**SIZES, **sizes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 8
            layer.self_attn.k_proj.weight *= 8
            layer.self_attn.v_proj.weight *= 4
    return model.to(dtype)


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def byte_tokenizer(special: tuple[str, ...] = ("<end>", "<a>", "<b>", "<c>")):
    """A tokenizer whose tokens are the special ones, then the 256 bytes; the first ends documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # transformers 5 renames some special tokens; plain ones stay.
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


def save_model(folder, *, seed=0, **sizes):
    """A small random Llama with a tokenizer of 260 tokens, as a Hugging Face folder."""
    small_model(seed=seed, vocab_size=260, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
