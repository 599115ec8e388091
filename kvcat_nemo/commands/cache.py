"""`kvcat cache`: what a compressed cache holds."""

from __future__ import annotations

import click

from kvcat_nemo.commands.options import friendly_errors


@click.group()
def command():
    """Look at what kvcat compress wrote."""


@command.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="All that the file says, as JSON.")
def inspect(file, as_json):
    """Say what the cache in FILE holds: model, document, slots, bytes, compressor and its settings.

    \b
    Examples:
      kvcat cache inspect paper.kv
      kvcat cache inspect paper.kv --json
    """
    import json

    from kvcat_nemo.compress.inspect import described

    with friendly_errors():
        found = described(file)
        if as_json:
            click.echo(json.dumps(found, indent=1))
            return
        for name, value in found.items():
            if name != "facts" and value is not None:
                click.echo(f"{name:12s} {value}")
