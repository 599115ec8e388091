"""One GGUF file of the Llama architecture → the files of a Hugging Face checkpoint, tensor by tensor.

llama.cpp stores q and k with the two halves of each head's rotary dimensions interleaved; Hugging Face keeps them
apart. Row 2·i + j of a head there is row j·(D/2) + i here (D: head dim, i < D/2, j ∈ {0, 1}).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
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


def hf_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; KeyError for an unknown tensor."""
    if gguf_name in _TOP_NAMES:
        return _TOP_NAMES[gguf_name]
    block, layer, kind, weight = gguf_name.split(".")
    if block != "blk" or weight != "weight":
        raise KeyError(gguf_name)
    return f"model.layers.{int(layer)}.{_LAYER_NAMES[kind]}.weight"


def undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads·D, E] in llama.cpp's row order → the same rows in Hugging Face's order."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(rows, columns)


def hf_tensors(reader, meta: dict) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Yield (name, shape, load) in file order; `load()` dequantises that one tensor to float32."""
    from gguf.quants import dequantize

    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    for tensor in reader.tensors:

        def load(tensor=tensor) -> np.ndarray:
            weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            kind = tensor.name.split(".")[-2]
            return undo_rope_permutation(weight, heads[kind]) if kind in heads else weight

        # GGUF counts dimensions from the innermost outwards.
        yield hf_name(tensor.name), tuple(int(n) for n in reversed(tensor.shape)), load


def write_safetensors(path: Path, tensors: list, step: Callable[[], None] = lambda: None) -> int:
    """Write float32 tensors one at a time, so that memory holds only the largest.

    Args:
        path: file to write.
        tensors: (name, shape, load) triples as from `hf_tensors`.
        step: called after each tensor.

    Returns:
        The number of parameters written.

    Raises:
        ValueError: a tensor whose data doesn't have its declared shape, or holds NaN or infinity.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors:
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape, load in tensors:
            weight = load()
            if weight.shape != shape or not np.isfinite(weight).all():
                raise ValueError(
                    f"{name}: {weight.shape} instead of {shape}, or not finite; the GGUF is damaged"
                )
            file.write(np.ascontiguousarray(weight, dtype="<f4"))
            step()
    return end // 4


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
