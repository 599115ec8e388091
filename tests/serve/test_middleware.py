"""Which document a request asks, and what the engine's server gets; no engine is needed."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvcat_nemo.serve.document import Document
from kvcat_nemo.serve.gate import ASKED, Gate, named_files
from kvcat_nemo.serve.middleware import CHAT, COMPLETIONS, Documents
from kvcat_nemo.serve.vllm_server import check_options, guard
from kvcat_nemo.tokens import chat_form, following_ids, load


@pytest.fixture(scope="module")
def gate(folder):
    tokenizer = load(folder)
    form = chat_form(tokenizer, "default").facts()
    documents = {
        name: Document(f"{name}.kv", sha * 64, 16, "float32", 160, made_in, {})
        for name, sha, made_in in (("manual", "1", None), ("law", "2", form))
    }
    return Gate(documents, "base", tokenizer, 380, 200, b"secret")


def through(gate, path, request, *, headers=(), chunks=1):
    """What the server behind the middleware gets, and what is answered."""
    seen, answers = [], []
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    size = -(-len(body) // chunks)
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    messages = [
        {"type": "http.request", "body": p, "more_body": n < len(parts) - 1} for n, p in enumerate(parts)
    ]

    async def app(scope, receive, send):
        got = await receive()
        seen.append((ASKED.get(), got["body"], dict(scope["headers"])))

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        answers.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    asyncio.run(Documents(app, gate)(scope, receive, send))
    assert ASKED.get() is None
    return seen, answers


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_completion_names_its_document_by_model_or_field(gate, chunks):
    for request in ({"model": "manual"}, {"model": "base", "document": "manual"}, {"document": "manual"}):
        seen, answers = through(gate, COMPLETIONS, {**request, "prompt": "the cache"}, chunks=chunks)
        (asked, body, headers), *_ = seen
        body = json.loads(body)
        assert not answers and asked.document == "manual" and asked.ids is None
        assert body["prompt"] == [following_ids(gate.tokenizer, "the cache")] and "document" not in body
        assert headers[b"content-length"] == str(len(seen[0][1])).encode()


def test_a_chat_is_the_conversation_behind_the_document(gate):
    messages = [{"role": "user", "content": "the cache"}]
    for name in ("manual", "law"):
        (asked, body, _), *_ = through(gate, CHAT, {"model": name, "messages": messages})[0]
        text = gate.tokenizer.decode(asked.ids)
        start = "" if name == "law" else "<|im_start|>user\n"
        assert text == start + "the cache<|im_end|>\n<|im_start|>assistant\n"
        assert json.loads(body)["messages"] == messages


def test_requests_without_a_document_pass_as_they_are(gate):
    for path, request in (
        (COMPLETIONS, {"model": "base", "prompt": "x", "echo": True}),
        (COMPLETIONS, {"model": "other", "prompt": "x"}),
        ("/v1/embeddings", {"model": "base"}),
        (COMPLETIONS, b"{not json"),
        (COMPLETIONS, b"[" * 100000),
        (COMPLETIONS, b"[1]"),
    ):
        seen, answers = through(gate, path, request)
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        assert not answers and seen[0][:2] == (None, body)


@pytest.mark.parametrize(
    ("path", "request_", "words"),
    [
        ("/v1/responses", {"model": "manual"}, ("documents are asked at",)),
        (COMPLETIONS, {"model": "manual", "prompt": "a", "echo": True}, ("echo",)),
        (COMPLETIONS, {"model": "manual", "prompt": "a", "prompt_logprobs": 1}, ("prompt_logprobs",)),
        (COMPLETIONS, {"model": "manual", "prompt": "a", "use_beam_search": True}, ("use_beam_search",)),
        (COMPLETIONS, {"model": "manual", "prompt": ""}, ("prompt[0]", "at least one character")),
        (COMPLETIONS, {"model": "manual"}, ("give a text",)),
        (COMPLETIONS, {"model": "manual", "prompt": "the " * 400}, ("16 slots", "the server takes 200")),
        (COMPLETIONS, {"model": "manual", "prompt": "a", "max_tokens": 190}, ("an answer of 190",)),
        (COMPLETIONS, {"document": "other", "prompt": "a"}, ("'other'", "manual, law")),
        (COMPLETIONS, {"model": "law", "document": "manual"}, ("model = 'law'",)),
        (CHAT, {"model": "manual", "messages": "hi"}, ("messages = str",)),
        (CHAT, {"model": "manual", "messages": []}, ("at least one message",)),
        (CHAT, {"model": "manual", "messages": [{"role": "user", "content": 3}]}, ("messages[0]", "int")),
        (CHAT, {"model": "manual", "messages": [{"role": "user", "content": "a"}], "tools": [1]}, ("tools",)),
        (
            CHAT,
            {
                "model": "law",
                "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
            },
            ("first message of the user",),
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(gate, path, request_, words):
    seen, answers = through(gate, path, request_)
    assert not seen and answers[0]["status"] == 400
    message = json.loads(answers[1]["body"])["error"]["message"]
    assert all(word in message for word in words), message


class Engine:
    """Records what it is given."""

    def __init__(self):
        self.given = []

    def generate(self, prompt, sampling_params, request_id, **more):
        self.given.append((prompt, sampling_params))


class Params:
    def __init__(self, extra=None, max_tokens=500):
        self.extra_args, self.max_tokens = extra, max_tokens


def test_only_the_gate_names_documents_and_salts(gate):
    from kvcat_nemo.serve.gate import Asked

    engine = Engine()
    guard(engine, gate)
    forged = {"kv_transfer_params": {"kvcat": "law", "other": 1}}
    given = Params(forged)
    engine.generate({"prompt_token_ids": [5]}, given, "1")
    prompt, params = engine.given[-1]
    assert prompt == {"prompt_token_ids": [5]} and params.extra_args == {"kv_transfer_params": {"other": 1}}
    assert given.extra_args == forged  # the caller's is left as it was
    salts = set()
    for name, salt in (("manual", None), ("law", None), ("manual", "tenant")):
        token = ASKED.set(Asked(name, [7, 8]))
        engine.generate({"prompt_token_ids": [5], "prompt": "x", "cache_salt": salt}, Params(forged), "2")
        ASKED.reset(token)
        prompt, params = engine.given[-1]
        assert prompt["prompt_token_ids"] == [*gate.placeholders[name], 7, 8] and "prompt" not in prompt
        assert params.extra_args == {"kv_transfer_params": {"kvcat": name}}
        assert params.max_tokens == 200 - 16 - 2
        salts.add(prompt["cache_salt"])
    assert len(salts) == 3
    token, blind = ASKED.set(Asked("manual", [7])), Params()
    blind.skip_reading_prefix_cache = True
    with pytest.raises(ValueError, match="read no cache"):
        engine.generate({"prompt_token_ids": [5]}, blind, "3")
    ASKED.reset(token)
    other = Gate(gate.documents, "base", gate.tokenizer, 380, 200, b"another server")
    assert other.salt("manual", None) not in salts


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["manual"], "--cache manual: give NAME=FILE"),
        (["a/b=x.kv"], "--cache a/b=x.kv"),
        (["=x.kv"], "give NAME=FILE"),
        (["a=x.kv", "a=y.kv"], "two documents 'a'"),
        (["base=x.kv"], "the model's own name"),
        ([], "at least one document"),
    ],
)
def test_names_that_are_none(values, words):
    with pytest.raises(ValueError, match=words):
        named_files(values, "base")


@pytest.mark.parametrize(
    "option", ["--kv-transfer-config={}", "--tensor-parallel-size", "--speculative_config"]
)
def test_options_of_the_engine_that_are_ours(option):
    with pytest.raises(ValueError, match=option.partition("=")[0].replace("_", "-")):
        check_options(["--max-model-len", "100", option])
