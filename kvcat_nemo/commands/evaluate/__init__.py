"""`kvcat evaluate`: how well models do under compressed caches, one sub-command per protocol, imported when used."""

from __future__ import annotations

import importlib

import click

from kvcat_nemo.commands.bounds import bound

_COMMANDS = {
    "continuation": "perplexity of a text's second part, its first part compressed (ΔPPL, KL, top-1)",
    "gradient": "ΔPPL per step while the slots of a small cache are trained",
    "needle": "a pass key in a long text, by budget, depth and length",
    "long-qa": "questions on long documents: QASPER, SQuAD's articles, LongBench v2",
    "ruler": "RULER-style synthetic tasks: needles of four kinds, variables, frequent words",
    "base-ability": "six multiple-choice benchmarks over the full cache, before and after training",
    "sweep": "many evaluations from one YAML file",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx):
        return list(_COMMANDS)

    def get_command(self, ctx, name):
        if name not in _COMMANDS:
            return None
        module = f"kvcat_nemo.commands.evaluate.{name.replace('-', '_')}"
        return bound(importlib.import_module(module).command)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(cls=_LazyGroup)
def command():
    """Measure models under compressed KV caches.

    Every protocol writes OUT/results.json (rows and a manifest) and keeps each measured item in OUT/items: a run that
    was stopped goes on when it is started again with the same settings, and ends with the same file.

    \b
    Examples:
      kvcat evaluate continuation models/smollm2-135m --out results/continuation
      kvcat evaluate sweep sweep.yaml --dry-run
    """
