"""Text to token ids and back.

A text has one of two places. It begins a document (`document_ids`): the tokenizer's beginning stands before it. Or it
follows other text (`following_ids`): nothing is put before it, not even the space with which some tokenizers begin a
text. No end token is ever added here: whoever ends documents adds it.

Special tokens that a text mentions are text: a page about chat templates must not end at its first "<|im_end|>". Tokens
that the tokenizer's files do not mark as special (as `<think>` in some) are ordinary entries of its vocabulary.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BOS = ("auto", "always", "never")
SPECIAL_TOKENS = ("text", "control")


@dataclass(frozen=True)
class IdRules:
    """How ids are made of text.

    Raises:
        ValueError: an unknown word.
    """

    bos: str = "auto"
    """Before a document: "auto": what the model's tokenizer puts there by itself (Llama's begin-of-text, nothing for Qwen2
    and SmolLM2). "always": its BOS token, whether it does so or not. "never": nothing."""
    special_tokens: str = "text"
    """Special tokens that a text mentions: "text": they are text. "control": they are the tokens they name."""

    def __post_init__(self):
        for name, known in (("bos", BOS), ("special_tokens", SPECIAL_TOKENS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose among {', '.join(known)}")


DEFAULT = IdRules()


def _checked(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: character {error.start} is half of a pair (U+{ord(text[error.start]):04X}), which is no text; give"
            " UTF-8"
        ) from None
    return text


def _encode(tokenizer, texts: Sequence[str], rules: IdRules) -> list[list[int]]:
    """Ids of each text alone: nothing before it, nothing behind it."""
    if not texts:
        return []
    return tokenizer(
        [_checked(text) for text in texts],
        add_special_tokens=False,
        split_special_tokens=rules.special_tokens == "text",
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning of long texts: who reads them checks their length
    )["input_ids"]


def beginning(tokenizer, bos: str = "auto") -> list[int]:
    """Ids that stand before a document; see IdRules.bos.

    Raises:
        ValueError: BOS is wanted of a tokenizer that has none.
    """
    IdRules(bos)
    if bos == "never":
        return []
    own = _own_beginning(tokenizer)
    if bos == "auto" or (tokenizer.bos_token_id is not None and tokenizer.bos_token_id in own):
        return own
    if tokenizer.bos_token_id is None:
        raise ValueError("bos='always': the tokenizer has no BOS token (bos_token); choose auto or never")
    return [tokenizer.bos_token_id, *own]


def _own_beginning(tokenizer) -> list[int]:
    """What the tokenizer's post-processor puts before a text."""
    for text in ("a", "0", "."):
        encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
        mask = encoded["special_tokens_mask"]
        if 0 in mask:  # else the text has no token in this vocabulary
            return encoded["input_ids"][: mask.index(0)]
    return []


def with_beginning(first: list[int], ids: list[int]) -> list[int]:
    """The ids behind the beginning, which is not doubled where they have it already (control tokens in the text)."""
    return ids if first and ids[: len(first)] == first else first + ids


def documents_ids(tokenizer, texts: Sequence[str], rules: IdRules = DEFAULT) -> list[list[int]]:
    """Token ids of texts that each begin a document: the tokenizer's beginning, then the text.

    Raises:
        ValueError: BOS is wanted of a tokenizer that has none; something that is no text.
    """
    first = beginning(tokenizer, rules.bos)
    return [with_beginning(first, ids) for ids in _encode(tokenizer, texts, rules)]


_INSIDE: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _inside(tokenizer) -> Any:
    """The tokenizer (of the `tokenizers` library) for texts that begin nothing; None where it makes no difference.

    Sentencepiece's tokenizers and some byte-level ones put a space before every text that they are given.
    """
    if tokenizer not in _INSIDE:
        from tokenizers import Tokenizer

        backend = tokenizer.backend_tokenizer
        definition = json.loads(backend.to_str())
        plain = {**definition, **{name: _without_prefix(definition[name]) for name in _PLACES}}
        copy = None
        if plain != definition:
            copy = Tokenizer.from_str(json.dumps(plain))
            copy.no_truncation()
            copy.no_padding()
        _INSIDE[tokenizer] = copy
    return _INSIDE[tokenizer]


_PLACES = ("normalizer", "pre_tokenizer")


def _without_prefix(part: dict | None) -> dict | None:
    """A normalizer's or pre-tokenizer's definition without what it puts before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, key: [x for x in map(_without_prefix, part[key]) if x is not None]}
    if part["type"] == "Metaspace" and part.get("prepend_scheme") != "never":
        # Older files say it twice.
        return {
            **part,
            "prepend_scheme": "never",
            **({"add_prefix_space": False} if "add_prefix_space" in part else {}),
        }
    if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
        return {**part, "add_prefix_space": False}
    return part


def following_ids(tokenizer, text: str, rules: IdRules = DEFAULT) -> list[int]:
    """Token ids of a text that follows other text: nothing is put before it."""
    inside = _inside(tokenizer)
    if inside is None:
        return _encode(tokenizer, [text], rules)[0]
    inside.encode_special_tokens = rules.special_tokens == "text"
    return inside.encode(_checked(text), add_special_tokens=False).ids


def answer_ids(tokenizer, before: str, answer: str, rules: IdRules = DEFAULT) -> tuple[list[int], list[int]]:
    """Token ids of `before`, which follows other text, and of the answer behind it, as the tokenizer parts both together.

    Where a token would span the border, the two are tokenised apart.
    """
    first, whole = (following_ids(tokenizer, text, rules) for text in (before, before + answer))
    if whole[: len(first)] == first and len(whole) > len(first):
        return first, whole[len(first) :]
    return first, following_ids(tokenizer, answer, rules)


def text_of(tokenizer, ids: list[int], *, after: Sequence[int] = (), special_tokens: bool = True) -> str:
    """The text of ids, as the ids say it (no spaces are tidied up).

    Args:
        after: ids that stand before them; where they matter (the space that begins a word) they are taken into account.
        special_tokens: whether special tokens are shown.
    """

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(
            list(part), skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False
        )

    if after:
        near = list(after)[-8:]
        head, whole = decode(near), decode([*near, *ids])
        if whole.startswith(head):
            return whole[len(head) :]
    return decode(ids)
