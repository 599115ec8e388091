"""Chat templates around a document: the text before it, and the text behind what is asked of it.

A template is given one message of the user, which is the document and then the question. The document's ids are those of
the template's text up to the document, and of the document; the prompt's ids those of the question and of the template's
rest (the end of the message, the beginning of the answer). Together they are what `apply_chat_template` makes of the
message document + question; but special tokens are recognised in the template alone, never in document and question.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.tokens.ids import (
    DEFAULT,
    IdRules,
    beginning,
    documents_ids,
    following_ids,
    with_beginning,
)

NONE, DEFAULT_NAME = "none", "default"
_MARK = "kvcat-document-goes-here"
_CONTROL = IdRules("never", "control")


@dataclass(frozen=True)
class ChatForm:
    """A chat template, parted where the document stands."""

    name: str
    """As it was asked for."""
    sha256: str
    """Of the template."""
    before: str
    """The template's text up to the document."""
    after: str
    """Its text from the end of the user's message to where the answer begins."""

    def facts(self) -> dict[str, str]:
        """What a cache remembers of it."""
        return {"name": self.name, "sha256": self.sha256, "after": self.after}

    def document_ids(self, tokenizer, text: str, rules: IdRules = DEFAULT) -> list[int]:
        """Ids of the template's text up to the document and of the document.

        BOS is the template's own ("auto"; transformers adds none either), or added where it has none ("always"), or
        taken away ("never").
        """
        border = _last_special(tokenizer, self.before)
        control, plain = self.before[:border], self.before[border:]
        head = _control_ids(tokenizer, control)
        # A tokenizer may begin a text behind a special token in one way or the other: as the template alone shows.
        whole = _control_ids(tokenizer, self.before + "a")
        own = IdRules("never", rules.special_tokens)
        if head + following_ids(tokenizer, plain + "a") == whole:
            ids = head + following_ids(tokenizer, plain + text, own)
        else:
            ids = head + documents_ids(tokenizer, [plain + text], own)[0]
        if rules.bos == "always":
            return with_beginning(beginning(tokenizer, "always"), ids)
        first = tokenizer.bos_token_id
        return ids[1:] if rules.bos == "never" and ids[:1] == [first] else ids

    def prompt_ids(self, tokenizer, text: str, rules: IdRules = DEFAULT) -> list[int]:
        """Ids of a question behind the document and of the template's rest."""
        return prompt_ids(tokenizer, text, self.after, rules)


def prompt_ids(tokenizer, text: str, after: str = "", rules: IdRules = DEFAULT) -> list[int]:
    """Ids of a text that follows a cached one, and of what a template puts behind it (`ChatForm.after`)."""
    border = _first_special(tokenizer, after)
    own = IdRules("never", rules.special_tokens)
    return following_ids(tokenizer, text + after[:border], own) + _control_ids(tokenizer, after[border:])


def chat_form(tokenizer, which: str) -> ChatForm | None:
    """The chat template of that name, parted at the document; None for "none".

    Args:
        which: "none", "default" (the tokenizer's own), the name of one of its named templates, or a file of Jinja.

    Raises:
        ValueError: no such template, one that fails, or one that does not hold the user's message exactly once.
    """
    if which == NONE:
        return None
    template = template_of(tokenizer, which)
    message = [{"role": "user", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(
            message, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything
        raise ValueError(f"chat template {which!r}: it fails on one message of a user: {error}") from error
    parts = text.split(_MARK)
    if len(parts) != 2:
        raise ValueError(
            f"chat template {which!r}: it holds the user's message {len(parts) - 1} times, so the document has no one"
            " place in it; choose a template that holds it once"
        )
    return ChatForm(which, template_digest(tokenizer, which), *parts)


def template_of(tokenizer, which: str) -> str:
    """The Jinja text of a template.

    Raises:
        ValueError: no such template; the message names those there are.
    """
    own: Any = tokenizer.chat_template
    named = own if isinstance(own, dict) else {} if own is None else {DEFAULT_NAME: own}
    if which in named:
        return named[which]
    if Path(which).is_file():
        try:
            return Path(which).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat template {which!r}: the file is not UTF-8 ({error.reason})") from None
    known = f"it has {', '.join(sorted(named))}" if named else "it has none"
    raise ValueError(
        f"chat template {which!r}: neither one of the tokenizer's templates ({known}) nor a file; choose one, or none"
    )


def template_digest(tokenizer, which: str) -> str:
    """sha256 of a template."""
    return hashlib.sha256(template_of(tokenizer, which).encode("utf-8")).hexdigest()


def _control_ids(tokenizer, text: str) -> list[int]:
    return documents_ids(tokenizer, [text], _CONTROL)[0] if text else []


def _specials(tokenizer) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return [token.content for token in added if token.special]


def _last_special(tokenizer, text: str) -> int:
    """Where the last special token of a text ends; 0 when there is none."""
    places = ((text.rfind(token), len(token)) for token in _specials(tokenizer))
    return max((place + size for place, size in places if place >= 0), default=0)


def _first_special(tokenizer, text: str) -> int:
    """Where the first special token of a text begins; the text's end when there is none."""
    places = (text.find(token) for token in _specials(tokenizer))
    return min((place for place in places if place >= 0), default=len(text))
