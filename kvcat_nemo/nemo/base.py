"""A base model's folder (kvcat convert import): where its tokenizer is, and whether a configuration fits it."""

from __future__ import annotations

import json
from pathlib import Path

from kvcat_nemo.nemo.config import architecture
from kvcat_nemo.runs.manifest import SEAL
from kvcat_nemo.runs.standing import examine, is_sealed
from kvcat_nemo.runs.vocabulary import CARD

# Megatron's name of a field → its name in the card.
_CARD_NAMES = {
    "layernorm_epsilon": "rms_norm_eps",
    "share_embeddings_and_output_weights": "tied",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_norm",
}


def tokenizer_dir(base: str | Path) -> Path:
    """The Hugging Face part (configuration and tokenizer) of a converted base model.

    Raises:
        ValueError: when the folder is not one that `kvcat convert import` wrote.
    """
    folder = Path(base) / "hf"
    if not (Path(base) / CARD).is_file() or not folder.is_dir():
        raise ValueError(
            f"{base}: not a converted base model (it lacks {CARD}). Make one: kvcat convert import HF_DIR {base}"
        )
    return folder


def require_base(base: str | Path, *, unverified: bool) -> None:
    """Refuse a base that nothing tells to be whole, or whose files have other names or sizes than its seal says.

    Hashes are compared by all ranks together, before the base is loaded (nemo.verify).

    Raises:
        ValueError: says what to do.
    """
    if not is_sealed(base):
        if not unverified:
            raise ValueError(
                f"resume.base={str(base)!r} has no {SEAL}: an older kvcat imported it, or another program wrote it. Import it again "
                f"(kvcat convert import HF_DIR {base} --force), or, if you trust it, set resume.unverified=True"
            )
        return
    standing = examine(base, hashes=False)
    if not standing.whole:
        raise ValueError(f"resume.base={str(base)!r}: {standing.why_not}")


def check_base(base: str | Path, config) -> None:
    """Compare a model configuration with the base model it is to start from.

    A training checkpoint has no card; the shapes of its tensors are checked when it is loaded.

    Raises:
        ValueError: naming the first field that differs, both values and the fix.
    """
    card = Path(base) / CARD
    if not card.is_file():
        return
    stored = json.loads(card.read_text())["architecture"]
    for name, value in architecture(config).items():
        want = stored[_CARD_NAMES.get(name, name)]
        if value is not None and value != want:
            raise ValueError(
                f"model.config.{name}={value!r}, but the base model {base} has {want!r}: "
                f"choose its recipe, or set model.config.{name}={want!r}"
            )
