"""What stands between an HTTP request and the engine: which document it asks, and the prompt that the engine gets.

The middleware (serve/middleware.py) finds the document that a request names and the ids of what is asked. Every prompt then passes
`Gate.prompt`, the one place that puts placeholder ids in front, names the document to the connector, and salts the prefix cache:
no other request, whatever ids it sends, can match a document's blocks.

Nothing here imports an engine.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcat_nemo.serve.document import Document, read_document

KEY = "kvcat"
"""In a request's kv_transfer_params: the document's name. Only the gate sets it."""


@dataclass(frozen=True)
class Asked:
    """What one HTTP request asks."""

    document: str
    ids: list[int] | None
    """Ids behind the document; None: those of the prompt that the engine's server made."""


ASKED: ContextVar[Asked | None] = ContextVar("kvcat_asked", default=None)


@dataclass
class Gate:
    """Documents by name, and the model that answers about them."""

    documents: dict[str, Document]
    model: str
    """Name under which the model is asked without a document."""
    tokenizer: Any
    vocab_size: int
    context: int
    """Tokens that the engine takes: prompt and answer."""
    secret: bytes
    """Of this server: salts of the prefix cache are made from it."""
    placeholders: dict[str, list[int]] = field(init=False)

    def __post_init__(self):
        self.placeholders = {name: d.placeholder_ids(self.vocab_size) for name, d in self.documents.items()}

    def salt(self, name: str, given: str | None) -> str:
        """Prefix-cache salt of a document's requests; a request's own salt parts it further."""
        said = f"{self.documents[name].sha256} {given or ''}".encode()
        return hmac.new(self.secret, said, hashlib.sha256).hexdigest()

    def prompt(self, ids: list[int], salt: str | None) -> tuple[list[int], str | None, str | None]:
        """What the engine gets in the place of a prompt.

        Args:
            ids: the prompt's; salt: the request's own cache_salt.

        Returns:
            ids, salt, and the document for the connector (None: without one, as it came).

        Raises:
            ValueError: when document and prompt are more than the engine takes.
        """
        asked = ASKED.get()
        if asked is None:
            return ids, salt, None
        own = ids if asked.ids is None else asked.ids
        if not own:
            raise ValueError(f"document {asked.document!r}: the prompt holds no token; ask at least one")
        self.check_length(asked.document, len(own), 1)
        return [*self.placeholders[asked.document], *own], self.salt(asked.document, salt), asked.document

    def check_length(self, name: str, asked: int, new: int) -> None:
        """Refuse what the engine does not take.

        Raises:
            ValueError: says how many tokens there are.
        """
        slots = self.documents[name].slots
        if slots + asked + new > self.context:
            raise ValueError(
                f"document {name!r} of {slots} slots, a prompt of {asked} tokens and an answer of {new}: {slots + asked + new}"
                f" tokens, the server takes {self.context}; ask less, or start it with a larger --max-model-len"
            )


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def named_files(values: list[str], model: str) -> dict[str, str]:
    """`NAME=FILE` of each --cache.

    Raises:
        ValueError: no name, a name twice, the model's own, or none at all.
    """
    out: dict[str, str] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not equals or not _NAME.fullmatch(name) or not file:
            raise ValueError(
                f"--cache {value}: give NAME=FILE; a name has letters, digits, dots, - and _, such as manual=manual.kv"
            )
        if name == model:
            raise ValueError(
                f"--cache {value}: {name!r} is the model's own name; give the document another one, or the model:"
                " --served-model-name"
            )
        if name in out:
            raise ValueError(
                f"--cache {value}: there are two documents {name!r}; give each a name of its own"
            )
        out[name] = file
    if not out:
        raise ValueError("--cache: give at least one document, NAME=FILE")
    return out


def open_documents(
    files: dict[str, str], *, fingerprint: str, model: str, dtype: str | None, limit: int
) -> tuple[dict[str, Document], str]:
    """Read and check every document before an engine is started.

    Args:
        fingerprint, model: of the model that is to serve them (evaluate.models.model_facts).
        dtype: the engine's; None: that of the caches.
        limit: tokens that the model reads.

    Returns:
        documents by name, and the dtype.

    Raises:
        ValueError: names the file that was cut off, damaged, or made by another model or for another dtype.
    """
    documents: dict[str, Document] = {}
    for name, file in files.items():
        document, _ = read_document(Path(file))
        made = document.facts.get("model")
        if made is None:
            raise ValueError(
                f"--cache {name}={file}: the file does not say which model made it; make it with kvcat compress"
            )
        if made != fingerprint:
            raise ValueError(
                f"--cache {name}={file}: it was made by {document.facts.get('model_name')} ({str(made)[:12]}…), not by {model}"
                f" ({fingerprint[:12]}…): another model's cache means nothing to it; compress the text again"
            )
        dtype = dtype or document.dtype
        if document.dtype != dtype:
            raise ValueError(
                f"--cache {name}={file}: keys and values of {document.dtype}, the server computes in {dtype}; compress it with"
                f" --cache-dtype {dtype}, or start the server with --dtype {document.dtype}"
            )
        if document.slots >= limit:
            raise ValueError(
                f"--cache {name}={file}: {document.slots} slots, but the server takes {limit} tokens, prompt and answer"
                " included; compress the text to fewer slots"
            )
        documents[name] = document
    return documents, dtype or "float32"
