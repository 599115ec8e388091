"""The real engine: `kvcat serve` as users start it, asked over HTTP. A small random model; make serve-test (.venv-serve).

The oracle is transformers' own generate on the same cache in the same dtype. Another model, such as SmolLM2-135M:
KVCAT_SERVE_MODEL=models/smollm2-135m make serve-test
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.tokens import end_ids, load

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]
NEW, CLIENTS = 16, 20
LOAD = int(os.environ.get("KVCAT_SERVE_REQUESTS", "500"))
"""Requests of the load test; continuous integration may ask for fewer."""
QUESTIONS = ["the cache of text", "grows with every", "number 12", "and so on", "text number 3 "]
NAMES = ("manual", "law", "log")


@pytest.fixture(scope="module")
def folder(folder):
    """The model that is served: the small one, or KVCAT_SERVE_MODEL."""
    return Path(os.environ.get("KVCAT_SERVE_MODEL") or folder)


def text_of(number: int) -> str:
    return "".join(
        f"the cache of text number {i * number} grows with every token of it: {i * 37 * number}, and so on. "
        for i in range(12)
    )


class Server:
    """`kvcat serve` in a process of its own."""

    def __init__(self, folder: Path, caches: dict[str, Path], log: Path, *more: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        names = [word for name, file in caches.items() for word in ("--cache", f"{name}={file}")]
        # One unbound thread: bound ones wait for each other where other work has their core.
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        self.log, self.name = log, folder.resolve().name
        self.ends = end_ids(load(folder))
        # Few pages: all of them are in use before memory is compared, and documents are thrown out and read in again.
        options = ["--enforce-eager", "--max-model-len", "1024", "--num-gpu-blocks-override", "200", *more]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvcat_nemo.cli", "serve", str(folder), *names]
            + ["--port", str(self.port), "--", *options],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> None:
        while self.process.poll() is None:
            try:
                if self.ask("GET", "/health")[0] == 200:
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"the server ended: {self.log.read_text()[-3000:]}")

    def ask(self, method: str, path: str, body=None, timeout: float = 600):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def complete(self, model: str, prompt: str, **more) -> dict:
        body = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}
        status, answer = self.ask("POST", "/v1/completions", body)
        assert status == 200, answer
        return json.loads(answer)

    def answer(self, model: str, prompt: str, **more) -> list[int]:
        """The tokens of an answer, without end tokens."""
        choice = self.complete(model, prompt, return_token_ids=True, **more)["choices"][0]
        return [x for x in choice["token_ids"] if x not in self.ends]

    def memory(self) -> int:
        """Resident bytes of the server and its engine."""
        total, waiting = 0, [self.process.pid]
        while waiting:
            pid = waiting.pop()
            fields = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += next(int(x.split()[1]) for x in fields if x.startswith("VmRSS")) * 1024
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        return total

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def caches(folder, tmp_path_factory):
    """Three documents, one of them in the chat template and one whose slots fill no whole page of the engine."""
    place, files = tmp_path_factory.mktemp("caches"), {}
    for number, name in enumerate(NAMES, 1):
        text = place / f"{name}.txt"
        text.write_text(text_of(number))
        files[name] = place / f"{name}.kv"
        words = ["--chat-template", "default"] if name == "law" else []
        slots = {"manual": 128, "law": 64, "log": 144}[name]
        line = [
            "compress",
            folder,
            "--text",
            text,
            "--servable",
            "--keep-tokens",
            slots,
            "--out",
            files[name],
        ]
        line += ["--compressor", "attention-matching:selection=highest:queries=context", *words]  # quick
        done = CliRunner().invoke(main, [str(x) for x in line])
        assert done.exit_code == 0, done.output
    return files


@pytest.fixture(scope="module")
def expected(folder, caches):
    """(document or model's name, question) → transformers' greedy tokens on the same cache, without end tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvcat_nemo.serve import inputs_for, load_cache
    from kvcat_nemo.tokens import document_ids

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, out = load(folder), {}
    ends = end_ids(tokenizer, model)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": list(ends), "pad_token_id": ends[0]}
    for question in QUESTIONS:
        for name, file in caches.items():
            cache = load_cache(file, model)
            inputs = inputs_for(cache, tokenizer, question)
            ids = model.generate(**inputs, past_key_values=cache, **options)
            out[name, question] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        plain = torch.tensor([document_ids(tokenizer, question)])
        ids = model.generate(plain, attention_mask=torch.ones_like(plain), **options)
        out[folder.name, question] = ids[0, plain.shape[1] :].tolist()
    return {key: [x for x in ids if x not in ends] for key, ids in out.items()}


@pytest.fixture(scope="module")
def text(folder):
    """Token ids → text, without the bytes of a character that is not complete: servers wait for its rest."""
    tokenizer = load(folder)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


@pytest.fixture(scope="module")
def server(folder, caches, tmp_path_factory):
    running = Server(folder, caches, tmp_path_factory.mktemp("log") / "server.log")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def test_greedy_answers_are_transformers_own(server, expected):
    assert len(set(map(tuple, expected.values()))) > 15  # the model tells documents and questions apart
    for (name, question), ids in expected.items():
        assert server.answer(name, question) == ids, (name, question)
        assert server.complete(name, question)["model"] == name


def test_twenty_clients_over_three_documents_and_none(server, expected):
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        asked = list(expected) * 2
        answers = list(pool.map(lambda key: server.answer(*key), asked))
    assert answers == [expected[key] for key in asked]


def test_chat_and_field_and_streaming(server, expected, text):
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    body = {"model": "law", "messages": messages, "max_tokens": NEW, "temperature": 0}
    status, answer = server.ask("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    said = json.loads(answer)["choices"][0]["message"]["content"]
    assert said.rstrip("\ufffd") == text(expected["law", QUESTIONS[0]])
    assert server.answer(server.name, QUESTIONS[1], document="manual") == expected["manual", QUESTIONS[1]]
    status, answer = server.ask("POST", "/v1/chat/completions", {**body, "stream": True})
    lines = [x.removeprefix(b"data: ") for x in answer.split(b"\n\n") if x.startswith(b"data: {")]
    parts = [json.loads(x)["choices"] for x in lines]
    streamed = "".join(x[0]["delta"].get("content") or "" for x in parts if x)
    assert streamed.rstrip("\ufffd") == text(expected["law", QUESTIONS[0]])
    names = {x["id"] for x in json.loads(server.ask("GET", "/v1/models")[1])["data"]}
    assert names == {server.name, *NAMES}


def test_a_documents_ids_alone_do_not_open_it(server, caches, expected, folder):
    """Somebody who knows the placeholder ids sends them as a prompt: the document's blocks do not match."""
    from kvcat_nemo.serve import read_document
    from kvcat_nemo.tokens import following_ids

    document, _ = read_document(caches["manual"])
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = [*document.placeholder_ids(size), *following_ids(load(folder), QUESTIONS[0])]
    for more in (
        {},
        {"kv_transfer_params": {"kvcat": "manual"}},
        {"cache_salt": "guess"},
    ):
        assert server.answer(server.name, ids, **more) != expected["manual", QUESTIONS[0]]
    assert server.answer("manual", QUESTIONS[0]) == expected["manual", QUESTIONS[0]]


def test_refusals_over_http(server):
    for body, words in (
        ({"model": "manual", "prompt": "a", "echo": True}, b"echo"),
        ({"model": "manual", "prompt": "a", "max_tokens": 1000}, b"takes 1024"),
        ({"model": server.name, "document": "nothing", "prompt": "a"}, b"manual, law, log"),
    ):
        status, answer = server.ask("POST", "/v1/completions", body)
        assert status == 400 and words in answer


def test_a_client_that_hangs_up(server, expected):
    for _ in range(5):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = {"model": "manual", "prompt": "a", "max_tokens": 800, "temperature": 1, "stream": True}
        connection.request(
            "POST",
            "/v1/completions",
            json.dumps(body | {"ignore_eos": True}),
            {"content-type": "application/json"},
        )
        connection.getresponse().read(20)
        connection.close()
    key = ("manual", QUESTIONS[2])
    assert server.answer(*key) == expected[key]


def test_a_load_without_a_wrong_answer_or_growth(server, expected):
    keys = [list(expected)[i % len(expected)] for i in range(LOAD)]
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        ask = lambda key: server.answer(*key) == expected[key]  # noqa: E731
        for _ in range(3):  # the server's own buffers grow for some 1,200 requests, and then no more
            assert all(pool.map(ask, keys))
        before = server.memory()
        assert all(pool.map(ask, keys))
    # What a request left behind, 16 kB each, would be seen: 500 of them are 8 MB; a document's slots are a hundred times that.
    assert server.memory() - before < 8 * 2**20


def test_a_server_started_again_and_files_it_refuses(folder, caches, expected, tmp_path):
    again = Server(folder, {"manual": caches["manual"]}, tmp_path / "log", "--no-enable-prefix-caching")
    try:
        again.wait()
        for question in QUESTIONS[:2]:
            assert again.answer("manual", question) == expected["manual", question]
    finally:
        again.stop()
    assert again.process.returncode is not None
