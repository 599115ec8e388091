"""A conversation behind a document: the ids that follow the cached ones, for any number of messages.

A template's own special tokens are control tokens, those that a message mentions are text: no message can close itself and
speak as another role. Each message's text is made into ids together with the template's text around it, up to the next
special tokens on both sides, as `apply_chat_template` would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvcat_nemo.tokens.chat import (
    _control_ids,
    _first_special,
    _last_special,
    chat_form,
    template_digest,
    template_of,
)
from kvcat_nemo.tokens.ids import IdRules, following_ids

_TEXT = IdRules("never", "text")


def conversation_ids(
    tokenizer,
    messages: Sequence[dict[str, Any]],
    made_in: dict[str, str] | None,
    *,
    template: str = "default",
) -> list[int]:
    """Ids of a conversation that follows a cached document.

    Args:
        messages: {"role": …, "content": …} each; content is text, or a list of parts of type text.
        made_in: the template in which the document was compressed (ChatForm.facts): the first message of the user then begins
            with the document. None: the document came without a template, and the whole conversation follows it.
        template: for documents without one, as `chat_form` takes it.

    Raises:
        ValueError: no messages, one that is no text, or a template that cannot hold them.
    """
    texts = [_text(number, message) for number, message in enumerate(messages)]
    if not texts:
        raise ValueError("messages: give at least one message of the user")
    name = made_in["name"] if made_in else template
    marks = [f"kvcat-message-{number}-goes-here" for number in range(len(texts))]
    marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    text = _rendered(tokenizer, name, marked)
    pieces = []  # template's text before each message, and behind the last
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(
                f"messages: the chat template {name!r} does not hold every message exactly once, in their order; a document"
                " needs one that does"
            )
        pieces.append(before)
    pieces.append(text)
    if made_in:
        first = next((n for n, m in enumerate(messages) if m["role"] == "user"), None)
        form = chat_form(tokenizer, name)
        if template_digest(tokenizer, name) != made_in["sha256"]:
            raise ValueError(
                f"messages: the document was compressed in another chat template than {name!r} of this tokenizer is now"
            )
        if first != 0 or form is None or pieces[0] != form.before:
            raise ValueError(
                "messages: the document is part of the first message of the user, with which the conversation must begin (a"
                " system message would have to stand before the document); compress the document without a template to send one"
            )
        pieces[0] = ""
    else:
        pieces[0] = _without_bos(tokenizer, pieces[0], "".join(pieces))
    return _joined(tokenizer, pieces, texts)


def next_turn_ids(tokenizer, text: str, made_in: dict[str, str] | None, ended: bool) -> list[int]:
    """Ids of another question behind an answer that was generated.

    Args:
        ended: whether the answer's end token is there already.
    """
    if not made_in:
        return following_ids(tokenizer, text, _TEXT)
    marks = ["kvcat-question-goes-here", "kvcat-answer-goes-here", "kvcat-next-goes-here"]
    roles = ("user", "assistant", "user")
    marked = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    rest = _rendered(tokenizer, made_in["name"], marked).partition(marks[1])[2]
    between, found, after = rest.partition(marks[2])
    if not found:
        raise ValueError(f"chat template {made_in['name']!r}: it holds no second question")
    start = _first_special(tokenizer, between)
    if ended and start < len(between):  # the answer ended with this special token
        special = next(s for s in _specials_at(tokenizer, between, start))
        between = between[start + len(special) :]
    return _joined(tokenizer, [between, after], [text])


def _specials_at(tokenizer, text: str, place: int):
    for token in sorted(tokenizer.added_tokens_decoder.values(), key=lambda t: -len(t.content)):
        if token.special and text.startswith(token.content, place):
            yield token.content


def _joined(tokenizer, pieces: list[str], texts: list[str]) -> list[int]:
    """Ids of piece, text, piece, text, …, piece: special tokens are recognised in the pieces alone."""
    ids: list[int] = []
    open_text = ""  # not yet made into ids: since the template's last special token
    for number, piece in enumerate(pieces):
        first, last = _first_special(tokenizer, piece), _last_special(tokenizer, piece)
        if last == 0:
            open_text += piece
        else:
            ids += following_ids(tokenizer, open_text + piece[:first], _TEXT) if open_text or first else []
            ids += _control_ids(tokenizer, piece[first:last])
            open_text = piece[last:]
        if number < len(texts):
            open_text += texts[number]
    return ids + (following_ids(tokenizer, open_text, _TEXT) if open_text else [])


def _rendered(tokenizer, name: str, messages: list[dict[str, Any]]) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template_of(tokenizer, name), tokenize=False, add_generation_prompt=True
        )
    except ValueError:
        raise
    except Exception as error:  # a template may raise anything
        raise ValueError(f"messages: the chat template {name!r} refuses them: {error}") from error


def _text(number: int, message: Any) -> str:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where}: give a role and a content")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text", "")) for p in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: content of {type(content).__name__}; a document's questions are text")
    return content


def _without_bos(tokenizer, text: str, whole: str) -> str:
    """The template's first text without a BOS: a document stands before it.

    Where the template has the BOS token more than once, the token opens a message (SmolLM2's <|im_start|>) and stays.
    """
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if bos and whole.count(bos) == 1 else text
