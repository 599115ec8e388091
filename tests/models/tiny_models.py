"""Small random Hugging Face models with byte tokenizers, and config.json in the form of either generation of transformers."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import torch
import transformers

from tests.support.hf_models import byte_tokenizer

TOKENS = torch.tensor([[1, 5, 9, 200, 17, 255, 3, 42] * 12])
"""96 tokens: beyond every original context below, so that each part of a scaling matters."""

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 0,
}
THETA = 500000.0
ROPES = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16},
}
NEW = int(transformers.__version__.split(".")[0]) >= 5


def native(rope: dict) -> dict:
    """Arguments of a configuration class of the installed transformers."""
    if NEW:
        return {"rope_parameters": rope | {"rope_theta": THETA}}
    return {"rope_theta": THETA, "rope_scaling": None if rope["rope_type"] == "default" else dict(rope)}


def written(rope: dict, form: str) -> dict:
    """Fields of config.json as transformers 4 or 5 writes them, or both side by side; None takes a field away."""
    old = {"rope_theta": THETA, "rope_scaling": None if rope["rope_type"] == "default" else rope}
    new = {"rope_parameters": rope | {"rope_theta": THETA}}
    if form == "both":
        return old | new
    return (
        old | {"rope_parameters": None} if form == "4" else {"rope_theta": None, "rope_scaling": None} | new
    )


def edit(folder: Path, **changes) -> None:
    """Change config.json; None takes a field away, NULL writes null."""
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in changes}
    config |= {k: (None if v is NULL else v) for k, v in changes.items() if v is not None}
    path.write_text(json.dumps(config))


NULL = object()


@functools.cache
def _made(root: Path, family: str, rope: str, tied: bool, shard: int | None) -> tuple[Path, torch.Tensor]:
    folder = root / f"{family}-{rope}-{tied}-{shard}"
    options = SIZES | {"tie_word_embeddings": tied} | native(ROPES[rope])
    options |= {"head_dim": 32} if family == "Qwen3" else {}
    options |= {"sliding_window": None} if family == "Mistral" else {}
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            one = parameter.ndim == 1
            parameter.normal_(1.0 if one else 0.0, 0.3)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    byte_tokenizer().save_pretrained(folder)
    with torch.no_grad():
        return folder, model(TOKENS).logits


def make(root: Path, target: Path, family="Llama", rope="plain", tied=False, shard=None):
    """A private copy of a model, and the logits of the model that was saved, by transformers' own class.

    Args:
        root: of the session, where models are kept; shard: bytes per file, None for one file.
    """
    folder, logits = _made(root, family, rope, tied, shard)
    return Path(shutil.copytree(folder, target)), logits
