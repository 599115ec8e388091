"""`kvcat evaluate`: how well models do under compressed caches, one sub-command per protocol, made of its settings."""

from __future__ import annotations

import click

from kvcat_nemo.commands.bounds import bound


class _ProtocolGroup(click.Group):
    """The commands of kvcat_nemo.evaluate.registry, which is read when one is wanted; help needs no torch."""

    def list_commands(self, ctx):
        from kvcat_nemo.evaluate.registry import PROTOCOLS

        return [*PROTOCOLS, "sweep"]

    def get_command(self, ctx, name):
        from kvcat_nemo.evaluate.registry import PROTOCOLS

        if name == "sweep":
            from kvcat_nemo.commands.evaluate.sweep import command

            return bound(command)
        if name not in PROTOCOLS:
            return None
        from kvcat_nemo.commands.evaluate.options import protocol_command

        return bound(protocol_command(PROTOCOLS[name][0]))

    def format_commands(self, ctx, formatter):
        from kvcat_nemo.evaluate.registry import PROTOCOLS

        lines = [(name, settings.about) for name, (settings, _) in PROTOCOLS.items()]
        with formatter.section("Commands"):
            formatter.write_dl([*lines, ("sweep", "many evaluations from one YAML file")])


@click.command(cls=_ProtocolGroup)
def command():
    """Measure models under compressed KV caches.

    Every protocol writes OUT/results.json (rows and a manifest) and keeps each measured item in OUT/items: a run that
    was stopped goes on when it is started again with the same settings, and ends with the same file.

    \b
    Examples:
      kvcat evaluate continuation models/smollm2-135m --out results/continuation
      kvcat evaluate sweep sweep.yaml --dry-run
    """
