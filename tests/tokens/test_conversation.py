"""Conversations behind a document: the template's own text, and nothing that a message says becomes a control token."""

from __future__ import annotations

import pytest

from kvcat_nemo.tokens import chat_form, document_ids, load
from kvcat_nemo.tokens.chat import prompt_ids
from kvcat_nemo.tokens.conversation import conversation_ids, next_turn_ids
from tests.tokens.small_tokenizers import CASES

WITH_TEMPLATE = [case.name for case in CASES if case.template]
CHATML = ["plain", "bos-and-eos"]
TALK = [
    {"role": "user", "content": "the cache grows?"},
    {"role": "assistant", "content": "with every token"},
    {"role": "user", "content": [{"type": "text", "text": "and <|im_end|> then"}]},
]


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_one_message_is_a_prompt(folders, name):
    """Two ways to the same ids: `kvcat generate` asks a prompt, a chat request sends a message."""
    tokenizer = load(folders(name))
    for template in ["default", "rag"] if name == "named-templates" else ["default"]:
        facts = chat_form(tokenizer, template).facts()
        for text in ("the cache", " number 12?", "<|im_end|> so", "\n\nand"):
            found = conversation_ids(tokenizer, [{"role": "user", "content": text}], facts)
            assert found == prompt_ids(tokenizer, text, facts["after"])


@pytest.mark.parametrize("name", CHATML)
def test_a_conversation_is_the_templates_text(folders, name):
    tokenizer = load(folders(name))
    form = chat_form(tokenizer, "default")
    plain = [*TALK[:2], {"role": "user", "content": "and <|im_end|> then"}]
    for made_in, before in ((form.facts(), form.before), (None, "")):
        ids = conversation_ids(tokenizer, TALK, made_in)
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids) == text[len(before) :]
        assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


@pytest.mark.parametrize("name", ["bos", "prefix-space"])
def test_a_templates_bos_does_not_stand_behind_a_document(folders, name):
    tokenizer = load(folders(name))
    ids = conversation_ids(tokenizer, TALK[:1], None)
    assert tokenizer.bos_token_id not in ids
    assert document_ids(tokenizer, "a")[0] == tokenizer.bos_token_id


def test_the_next_turn_ends_the_answer_once(folders):
    tokenizer = load(folders("plain"))
    facts = chat_form(tokenizer, "default").facts()
    rest = "\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(next_turn_ids(tokenizer, "why?", facts, ended=True)) == rest
    assert tokenizer.decode(next_turn_ids(tokenizer, "why?", facts, ended=False)) == "<|im_end|>" + rest
    assert tokenizer.decode(next_turn_ids(tokenizer, " why?", None, ended=False)) == " why?"


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("plain", [], "at least one message"),
        ("plain", [{"role": "system", "content": "x"}, *TALK], "first message of the user"),
        ("plain", [{"role": "user"}], "content of NoneType"),
        ("plain", [{"content": "x"}], "a role and a content"),
        ("plain", [{"role": "user", "content": [{"type": "image_url"}]}], "content of list"),
        ("bos", TALK, "exactly once"),
    ],
)
def test_messages_that_fit_no_document(folders, name, messages, words):
    tokenizer = load(folders(name))
    with pytest.raises(ValueError, match=words):
        conversation_ids(tokenizer, messages, chat_form(tokenizer, "default").facts())
