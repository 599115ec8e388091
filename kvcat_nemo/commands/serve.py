"""`kvcat serve`: vLLM's own server with compressed documents in it."""

from __future__ import annotations

import click

from kvcat_nemo.commands.options import SERVED_DTYPES, friendly_errors


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.option(
    "--cache",
    "caches",
    required=True,
    multiple=True,
    metavar="NAME=FILE",
    help="A document: what kvcat compress --servable wrote, and the name under which it is asked. Several times for several.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option(
    "--dtype",
    type=click.Choice(SERVED_DTYPES),
    help="In which the server computes; the caches must be of the same.  [default: that of the caches]",
)
@click.option(
    "--served-model-name",
    "served",
    help="Name under which the model is asked without a document.  [default: the model's]",
)
@click.option("--check", is_flag=True, help="Check model and documents, print them, and stop.")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
def command(model, caches, host, port, dtype, served, check, vllm_options):
    """Serve MODEL (a Hugging Face folder or a hub id) with vLLM, and compressed documents by name: an OpenAI-compatible server.

    A request whose "model" is a document's name is answered on that document; one with the model's own name, without. Every
    other option goes to vLLM's server (vllm serve --help), after --.

    vLLM lives in an environment of its own: make .venv-serve.

    \b
    Examples:
      kvcat serve models/smollm2-135m --cache manual=manual.kv --cache law=law.kv --port 8000
      kvcat serve models/smollm2-135m --cache manual=manual.kv -- --max-model-len 4096 --api-key SECRET
    """
    with friendly_errors():
        _serve(model, caches, host, port, dtype, served, check, list(vllm_options))


def _serve(model, caches, host, port, dtype, served, check, options):
    import os
    import secrets

    from kvcat_nemo.compress.context_limit import position_limit
    from kvcat_nemo.evaluate.models import find_model, model_facts
    from kvcat_nemo.serve import vllm_server
    from kvcat_nemo.serve.gate import Gate, named_files, open_documents
    from kvcat_nemo.tokens import load

    options = [x for x in options if x != "--"]
    vllm_server.check_options(options)
    folder = find_model(model)
    served = served or folder.name
    # What vLLM needs is here now: it must not ask the hub for anything else.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    files = named_files(caches, served)
    if not check:
        vllm_server.check_installed()
    facts = model_facts(folder)
    limit = position_limit(folder.config)
    documents, dtype = open_documents(
        files, fingerprint=facts.fingerprint, model=str(model), dtype=dtype, limit=limit
    )
    for name, document in documents.items():
        click.echo(
            f"{name}: {document.path}, {document.slots} slots for {document.text_tokens} tokens of text, {document.dtype}",
            err=True,
        )
    if check:
        return
    tokenizer = load(folder.path)
    gate = Gate(documents, served, tokenizer, folder.vocab_size, limit, secrets.token_bytes(32))
    line = vllm_server.engine_options(str(folder.path), served, documents, dtype, options)
    args = vllm_server.parsed([*line, "--host", host, "--port", str(port)])
    import uvloop

    uvloop.run(vllm_server.run(args, gate))
