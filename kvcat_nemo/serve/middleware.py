"""HTTP requests that name a document: what is asked of it, as ids behind the document's.

An ASGI middleware for an OpenAI-compatible server: /v1/completions and /v1/chat/completions. A request names a document by
`model`, or by a field `document` beside the model's own name. What the engine could not answer rightly over a compressed document is
refused with status 400; other paths are refused when they name one.
"""

from __future__ import annotations

import json
from typing import Any

from kvcat_nemo.serve.gate import ASKED, KEY, Asked, Gate
from kvcat_nemo.tokens import IdRules
from kvcat_nemo.tokens.chat import prompt_ids
from kvcat_nemo.tokens.conversation import conversation_ids

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REFUSED = {
    "prompt_logprobs": "the document's tokens are not there any more",
    "echo": "the document's tokens are not there any more",
    "use_beam_search": "beams are not served over documents; ask for n answers",
    "truncate_prompt_tokens": "a cut prompt would lose the document",
    "prompt_embeds": "documents are asked in text",
    "suffix": "documents are asked in text that follows them",
    "tools": "tools stand before the document in chat templates; leave them out",
    "documents": "the document is the cached one",
    "chat_template": "the template is the one in which the document was compressed",
    "chat_template_kwargs": "the template is the one in which the document was compressed",
    "continue_final_message": "an answer begins anew",
}
"""Fields that change what the engine reads; an absent, null, false or empty one is no matter."""


class Documents:
    """The middleware. Runs behind the server's own authentication."""

    def __init__(self, app, gate: Gate):
        self.app, self.gate = app, gate

    async def __call__(self, scope, receive, send) -> None:
        """Pass a request on, its body changed where it names a document."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = await _whole(receive)
        if body is None:
            return  # the client is gone
        try:
            asked, body = self.read(scope["path"], body)
        except ValueError as error:
            await _refuse(send, str(error))
            return
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        ahead = [{"type": "http.request", "body": body, "more_body": False}]

        async def again():
            return ahead.pop() if ahead else await receive()

        token = ASKED.set(asked)
        try:
            await self.app(scope, again, send)
        finally:
            ASKED.reset(token)

    def read(self, path: str, body: bytes) -> tuple[Asked | None, bytes]:
        """The document that a request asks, and the body that the engine's server gets.

        Raises:
            ValueError: a document that is not there, or a request that cannot be answered over one.
        """
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None, body  # the server says what is wrong with it
        if not isinstance(request, dict):
            return None, body
        name = self.named(request)
        if name is None:
            return None, json.dumps(request).encode() if "document" in request else body
        path = path.rstrip("/")
        if path not in (COMPLETIONS, CHAT):
            raise ValueError(f"document {name!r}: documents are asked at {COMPLETIONS} and {CHAT}")
        for given, why in REFUSED.items():
            value = request.get(given)
            if not (value is None or value is False or value in ([], {}, "")):
                raise ValueError(f"document {name!r}: {given} cannot be answered: {why}")
        if request.get("add_generation_prompt") is False:
            raise ValueError(f"document {name!r}: add_generation_prompt=false cannot be answered")
        request.pop("document", None)
        if isinstance(request.get("kv_transfer_params"), dict):
            request["kv_transfer_params"].pop(KEY, None)
        made_in = self.gate.documents[name].made_in
        if path == CHAT:
            template = "default"
            messages = request.get("messages")
            if not isinstance(messages, list):
                raise ValueError(f"messages = {type(messages).__name__}: give a list of messages")
            ids = conversation_ids(self.gate.tokenizer, messages, made_in, template=template)
            self._check(name, request, ids)
            return Asked(name, ids), json.dumps(request).encode()
        request["prompt"] = self._prompts(request.get("prompt"), made_in)
        for ids in request["prompt"]:
            self._check(name, request, ids)
        return Asked(name, None), json.dumps(request).encode()

    def named(self, request: dict[str, Any]) -> str | None:
        """The document that a request names; None: none."""
        model, document = request.get("model"), request.get("document")
        if document is None:
            return model if isinstance(model, str) and model in self.gate.documents else None
        known = ", ".join(self.gate.documents)
        if not isinstance(document, str) or document not in self.gate.documents:
            raise ValueError(f"document = {document!r}: this server has {known}")
        if model not in (None, self.gate.model, document):
            raise ValueError(
                f"document = {document!r} with model = {model!r}: documents belong to {self.gate.model!r}; name that model, or"
                " the document as model"
            )
        return document

    def _prompts(self, given: Any, made_in: dict[str, str] | None) -> list[list[int]]:
        """Prompts of /v1/completions as ids: text, a list of texts, or ids."""
        if isinstance(given, str):
            given = [given]
        if isinstance(given, list) and given and all(type(x) is int for x in given):
            given = [given]
        if not isinstance(given, list) or not given:
            raise ValueError("prompt: give a text, or a list of texts")
        after, out = made_in["after"] if made_in else "", []
        for number, one in enumerate(given):
            if isinstance(one, str) and one:
                out.append(prompt_ids(self.gate.tokenizer, one, after, IdRules("never", "text")))
            elif isinstance(one, list) and one and all(type(x) is int for x in one):
                out.append(one)
            else:
                raise ValueError(f"prompt[{number}]: give a text of at least one character, or token ids")
        return out

    def _check(self, name: str, request: dict[str, Any], ids: list[int]) -> None:
        new = next(
            (request[x] for x in ("max_completion_tokens", "max_tokens") if type(request.get(x)) is int), 1
        )
        self.gate.check_length(name, len(ids), max(new, 1))


async def _whole(receive) -> bytes | None:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _refuse(send, why: str) -> None:
    said = {"error": {"message": why, "type": "BadRequestError", "param": None, "code": 400}}
    body = json.dumps(said).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
