"""The one place where text becomes token ids and ids become text: BOS, special tokens, end tokens, chat templates."""

from kvcat_nemo.tokens.chat import ChatForm, chat_form
from kvcat_nemo.tokens.ends import end_ids
from kvcat_nemo.tokens.files import has_tokenizer, is_tokenizer_file, tokenizer_files
from kvcat_nemo.tokens.ids import (
    BOS,
    DEFAULT,
    SPECIAL_TOKENS,
    IdRules,
    answer_ids,
    beginning,
    documents_ids,
    following_ids,
    text_of,
)
from kvcat_nemo.tokens.loading import load

__all__ = [
    "BOS",
    "DEFAULT",
    "SPECIAL_TOKENS",
    "ChatForm",
    "IdRules",
    "answer_ids",
    "beginning",
    "chat_form",
    "document_ids",
    "documents_ids",
    "end_ids",
    "following_ids",
    "has_tokenizer",
    "is_tokenizer_file",
    "load",
    "text_of",
    "tokenizer_files",
]


def document_ids(tokenizer, text: str, rules: IdRules = DEFAULT) -> list[int]:
    """Token ids of one text that begins a document; see `documents_ids`."""
    return documents_ids(tokenizer, [text], rules)[0]
