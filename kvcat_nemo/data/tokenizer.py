"""The Hugging Face fast tokenizer as the dataset builder needs it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.models.config import read_vocabulary


@dataclass(frozen=True)
class DocumentTokenizer:
    """Turns texts into token ids, each ended by the end-of-document token."""

    backend: Any
    """The `tokenizers.Tokenizer`."""
    eod_token: str
    """The end-of-document token."""
    eod_id: int
    """Its id."""
    vocab_size: int
    """The model's vocabulary (config.json beside the tokenizer), else the tokenizer's: ids are below it."""
    fingerprint: str
    """sha256 of the tokenizer's whole definition."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, EOD last; no other special token is ever added or recognised in the text."""
        return [e.ids + [self.eod_id] for e in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: str | Path, eod_token: str | None = None) -> DocumentTokenizer:
    """Load the fast tokenizer of a Hugging Face folder.

    Args:
        folder: holds the tokenizer's files; config.json, when there, is checked against it.
        eod_token: end-of-document token; the tokenizer's end-of-sequence token by default.

    Raises:
        ValueError: no tokenizer there, no fast one, no such EOD token, or a vocabulary the model doesn't have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"tokenizer {str(folder)!r} is not a folder; give a Hugging Face model folder")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{folder}: no tokenizer there (neither tokenizer.json nor tokenizer_config.json)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
    except Exception as error:  # transformers raises a dozen kinds for a damaged folder
        raise ValueError(f"{folder}: the tokenizer can't be loaded ({error})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: {type(tokenizer).__name__} has no fast version (tokenizer.json)")
    token = eod_token if eod_token is not None else tokenizer.eos_token
    if token is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-sequence token; name one with --eod-token")
    backend = tokenizer.backend_tokenizer
    eod_id = backend.token_to_id(token)
    if eod_id is None:
        raise ValueError(f"{folder}: the end-of-document token {token!r} is not in the vocabulary")
    largest = max(backend.get_vocab().values())
    vocab_size = read_vocabulary(folder) or largest + 1
    if largest >= vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {largest}, the model's vocabulary (config.json) is {vocab_size}"
        )
    # A text that merely mentions "<|im_end|>" must not end its document there.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    definition = backend.to_str() + f"\neod={eod_id}"
    return DocumentTokenizer(
        backend, token, eod_id, vocab_size, hashlib.sha256(definition.encode("utf-8")).hexdigest()
    )


@contextlib.contextmanager
def threads(workers: int) -> Iterator[None]:
    """Let the tokenizer use `workers` threads inside the block.

    The first block of a process fixes the number; later ones can only switch between that and 1.
    """
    wanted = {"RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true" if workers > 1 else "false"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
