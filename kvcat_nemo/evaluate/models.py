"""Hugging Face models as evaluations take them: checked before any work, loaded whole, with a fingerprint."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvcat_nemo import tokens
from kvcat_nemo.common.files import sha256_of
from kvcat_nemo.common.limits import check_config_fits_weights
from kvcat_nemo.evaluate.settings import DTYPES
from kvcat_nemo.models.families import FAMILIES
from kvcat_nemo.models.hf_config import parse_config, read_config
from kvcat_nemo.models.hub import model_folder, own_name, pinned
from kvcat_nemo.models.load import load_causal_lm
from kvcat_nemo.models.weights import check_tied, find_weights
from kvcat_nemo.runs.integrity import require_unchanged
from kvcat_nemo.runs.layout import CARD, CHECKPOINTS, CONTEXT, WEIGHTS


@dataclass(frozen=True)
class ModelFacts:
    """What identifies a model in results."""

    name: str
    path: str
    fingerprint: str
    """sha256 over config.json's settings and the weight files."""
    tokenizer: str
    """sha256 of the tokenizer's definition."""
    hub: str | None = None
    """owner/name@commit of a model of the hub."""

    def facts(self) -> dict[str, str]:
        """What results record of it (no path: that may change)."""
        return {"fingerprint": self.fingerprint, "tokenizer": self.tokenizer} | (
            {"hub": self.hub} if self.hub else {}
        )


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A folder that looks like a Hugging Face model: its files are there and whole. Nothing is loaded yet."""

    name: str
    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]

    @property
    def context(self) -> int:
        """Tokens that the model reads at most (max_position_embeddings)."""
        from kvcat_nemo.compress.context_limit import position_limit

        return position_limit(self.config)

    def check_reads(self, length: int, new: int, fix: str) -> None:
        """Refuse a text of `length` tokens with `new` more behind it that the model does not read.

        Raises:
            ValueError: names the model and its limit.
        """
        from kvcat_nemo.compress.context_limit import check_positions

        check_positions(self.config, [length], new, what=f"model {self.name}: text", fix=fix)

    @property
    def vocab_size(self) -> int | None:
        return self.config.get("vocab_size")


def find_model(specification: str | Path) -> ModelFolder:
    """Check a model without loading it; one of the hub is fetched.

    Args:
        specification: a folder or a hub id (kvcat_nemo.models.hub), or NAME=folder or NAME=id; by default the name is the
            folder's or the repository's.

    Raises:
        ValueError: not a folder, a Megatron checkpoint, no safetensors, a missing or truncated file, or a folder that
            two readers would read differently (kvcat_nemo.models); the message says what to do.
    """
    text = str(specification)
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        name, rest = "", text
    path = model_folder(rest)
    if not (path / "config.json").is_file():
        raise ValueError(f"model {rest!r}: {_what_it_is(path)}")
    config = read_config(path)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model {rest!r}: model_type={kind!r}; evaluations know {', '.join(FAMILIES)}")
    described = parse_config(config, str(path / "config.json"))
    weights = find_weights(path)
    check_tied(path, weights, described.tied)
    if not tokens.has_tokenizer(path):
        raise ValueError(
            f"model {rest!r}: no tokenizer there; copy the base model's tokenizer files into the folder"
        )
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    check_config_fits_weights(config, shapes, f"model {rest!r}: config.json")
    return ModelFolder(name or own_name(path), path, config, weights.files)


def _what_it_is(path: Path) -> str:
    megatron = (CARD, WEIGHTS, CHECKPOINTS, "metadata.json", "common.pt", CONTEXT)
    if any((path / name).exists() for name in megatron):
        return "a Megatron checkpoint; export it first: kvcat export CKPT OUT, then give OUT"
    return "no config.json there, so it is no Hugging Face model folder"


def find_models(specifications: list[str]) -> list[ModelFolder]:
    """Check all models, and that their names differ.

    Raises:
        ValueError: as find_model; two of the same name; none at all.
    """
    if not specifications:
        raise ValueError("models: give at least one model folder")
    found = [find_model(x) for x in specifications]
    names = [x.name for x in found]
    for model in found:
        if names.count(model.name) > 1:
            raise ValueError(
                f"models: two are called {model.name!r}; name them, e.g. base={model.path} trained=OTHER/FOLDER"
            )
    return found


def weights_fingerprint(model: ModelFolder) -> str:
    """sha256 over the configuration (not its formatting, nor who wrote it) and every weight file."""
    config = {k: v for k, v in model.config.items() if k not in ("transformers_version", "_name_or_path")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for file in model.weights:
        digest.update(f"\n{file.name} {sha256_of(file)}".encode())
    return digest.hexdigest()


def tokenizer_fingerprint(model: ModelFolder) -> str:
    """sha256 of the tokenizer's definition.

    Raises:
        ValueError: when the tokenizer cannot be loaded.
    """
    from kvcat_nemo.data.tokenizer import load_tokenizer

    return load_tokenizer(model.path).fingerprint


# Once a process: evaluations load a model for every protocol.
_unchanged = functools.cache(require_unchanged)


@functools.cache
def model_facts(model: ModelFolder) -> ModelFacts:
    """What identifies a model; reads its files once.

    Raises:
        ValueError: when the tokenizer cannot be loaded, or an exported model's files changed since.
    """
    _unchanged(model.path)
    made = weights_fingerprint(model), tokenizer_fingerprint(model)
    return ModelFacts(model.name, str(model.path), *made, hub=pinned(model.path))


def load_model(path: str | Path | ModelFolder, dtype: str = "float32", device: str = "auto"):
    """Load a model and its tokenizer for evaluation.

    Args:
        path: folder, NAME=folder, or what `find_model` returned.
        dtype: of DTYPES.
        device: as torch names it; "auto" takes CUDA where there is one.

    Returns:
        (model in eval mode without gradients, tokenizer, ModelFacts).

    Raises:
        ValueError: as `find_model` and `kvcat_nemo.models.load.load_causal_lm`; an exported model whose files changed since; an
            unknown dtype.
    """
    from kvcat_nemo.compress.fit import know

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose among {', '.join(DTYPES)}")
    folder = path if isinstance(path, ModelFolder) else find_model(path)
    _unchanged(folder.path)
    model = load_causal_lm(folder.path, getattr(torch, dtype))
    try:
        tokenizer = tokens.load(folder.path)
    except Exception as error:  # transformers raises a dozen kinds for a damaged folder
        raise ValueError(f"model {str(folder.path)!r} cannot be loaded ({error})") from error
    model, facts = model.to(choose_device(device)).requires_grad_(False), model_facts(folder)
    know(model, facts.fingerprint, facts.name)
    return model, tokenizer, facts


def choose_device(device: str) -> torch.device:
    """The device that a name means; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: when there is no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r}: not usable here ({error})") from None
    return chosen
