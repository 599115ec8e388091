"""A small model made at run time from a fixed seed, as a Hugging Face folder and converted: no weights travel with the code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kvcat_nemo.runs.layout import CARD

SHAPES: dict[str, dict[str, Any]] = {
    "D 64, tied": {"layers": 4, "hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "tied": True},
    "D 128, untied": {"layers": 4, "hidden": 256, "heads": 2, "kv_heads": 1, "head_dim": 128, "tied": False},
}


def shape_of(name: str, device: str) -> dict[str, Any]:
    """A model of SHAPES with its windows; on a CPU, where the doctor is only tested, smaller.

    Of a hundred keep decisions bf16 turns about one. A step has some thousand tokens, so that the figures, which are means
    over them, move by less than their bound.
    """
    if device == "cuda":
        return SHAPES[name] | {"tokens": 512, "windows": 4, "vocab": 503}
    return SHAPES[name] | {
        "layers": 2, "hidden": 64, "heads": 2, "kv_heads": 2, "tokens": 128, "windows": 8, "vocab": 128,
    }  # fmt: skip


def make(shape: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """(Hugging Face folder, converted folder) of a random Qwen2 of that shape.

    Weights are drawn so that no sum is flat: with the usual 0.02 all logits would be about equal, whatever layers do.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from kvcat_nemo.conversion.importing import import_hf

    hf, megatron = folder / "hf", folder / "megatron"
    if (megatron / CARD).is_file():
        return hf, megatron
    config = Qwen2Config(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=2 * shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["tokens"],
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=shape["tied"],
    )
    model = Qwen2ForCausalLM(config)
    rng = torch.Generator().manual_seed(17)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if parameter.dim() >= 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(0.1 * noise)  # biases of zero would hide a dropped one
    model.save_pretrained(hf)
    return hf, import_hf(hf, megatron)
