"""config.json and tokenizer of a GGUF file that holds SmolLM2. transformers' own loader reads its weights.

That loader's configuration and tokenizer are not those of the model: eps is a float32's long decimal, the tokenizer puts BOS
before every text, takes it for EOS too, and leaves digits of other scripts in pairs (transformers 4.57).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

_SPECIAL_TOKEN = 3  # tokenizer.ggml.token_type of control tokens


def read_metadata(reader) -> dict:
    """The key-value part of a `gguf.GGUFReader`, for the Llama architecture.

    Raises:
        ValueError: another architecture or another tokenizer than byte-level BPE with SmolLM's splitting.
    """
    meta = {key: field.contents() for key, field in reader.fields.items()}
    for key, wanted in {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }.items():
        if meta.get(key) != wanted:
            raise ValueError(f"{key} is {meta.get(key)!r}; only {wanted!r} is supported")
    return meta


def hf_config(meta: dict, tied: bool) -> dict:
    """config.json as a dict, readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
    theta = float(meta["llama.rope.freq_base"])
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        # Stored as float32: its shortest decimal is the number that was meant (1e-05, not 9.9999997e-06).
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": meta["llama.embedding_length"] ** -0.5,
        "tie_word_embeddings": tied,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
        "use_cache": True,
    }


def build_tokenizer(meta: dict):
    """The fast tokenizer inside a GGUF, as a `tokenizers.Tokenizer`: byte-level BPE, each digit by itself."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _SPECIAL_TOKEN
        ]
    )
    return tokenizer


def write_tokenizer(folder: Path, meta: dict) -> None:
    """tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template."""
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(meta),
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        model_max_length=meta["llama.context_length"],
        # Cleaning up would turn " ." into "." and break the round trip.
        clean_up_tokenization_spaces=False,
        # Llama takes no token_type_ids: generate(**tokenizer(text)) must just work.
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    tokenizer.save_pretrained(folder)
