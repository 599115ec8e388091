"""The Hugging Face fast tokenizer as the dataset builder needs it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.models.hf_config import read_vocabulary
from kvcat_nemo.models.hub import model_folder
from kvcat_nemo.tokens import DEFAULT, IdRules, beginning, documents_ids, load, text_of


@dataclass(frozen=True)
class DocumentTokenizer:
    """Turns texts into token ids, each begun as the rules say and ended by the end-of-document token."""

    hf: Any
    """The tokenizer as transformers loads it."""
    eod_token: str
    """The end-of-document token."""
    eod_id: int
    """Its id."""
    vocab_size: int
    """The model's vocabulary (config.json beside the tokenizer), else the tokenizer's: ids are below it."""
    fingerprint: str
    """sha256 of the tokenizer's whole definition."""
    rules: IdRules = DEFAULT
    """How ids are made of text."""

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`."""
        return self.hf.backend_tokenizer

    @property
    def beginning(self) -> list[int]:
        """Ids that stand before every document."""
        return beginning(self.hf, self.rules.bos)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text as a document: its beginning first, EOD last."""
        return [[*ids, self.eod_id] for ids in documents_ids(self.hf, texts, self.rules)]

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text alone: no beginning, no EOD."""
        return documents_ids(self.hf, texts, IdRules("never", self.rules.special_tokens))

    def decode(self, ids: list[int]) -> str:
        return text_of(self.hf, ids)


def load_tokenizer(
    folder: str | Path, eod_token: str | None = None, rules: IdRules = DEFAULT
) -> DocumentTokenizer:
    """Load the fast tokenizer of a Hugging Face folder or hub id.

    Args:
        folder: holds the tokenizer's files, or a hub id (kvcat_nemo.models.hub); config.json, when there, is checked against it.
        eod_token: end-of-document token; the tokenizer's end-of-sequence token by default.
        rules: how ids are made of text.

    Raises:
        ValueError: no tokenizer there, no fast one, no such EOD token, no BOS token where one is wanted, or a vocabulary
            that the model doesn't have.
    """
    folder = model_folder(folder, weights=False, what="tokenizer")
    tokenizer = load(folder)
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
    backend.no_truncation()
    backend.no_padding()
    definition = backend.to_str() + f"\neod={eod_id}"
    fingerprint = hashlib.sha256(definition.encode("utf-8")).hexdigest()
    try:
        beginning(tokenizer, rules.bos)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return DocumentTokenizer(tokenizer, token, eod_id, vocab_size, fingerprint, rules)


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
