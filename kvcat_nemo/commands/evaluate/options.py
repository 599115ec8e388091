"""From a protocol's settings to its command: every option is declared in kvcat_nemo.evaluate.settings alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from kvcat_nemo.commands.options import friendly_errors
from kvcat_nemo.evaluate.options import Option, default_of, kinds_of, options_of
from kvcat_nemo.evaluate.settings import ProtocolSettings


def protocol_command(settings: type[ProtocolSettings]) -> click.Command:
    """The command of a protocol: its models are arguments, its other settings options, its docstring the help."""
    common = {field.name for field in dataclasses.fields(ProtocolSettings)}
    options = options_of(settings)
    ordered = sorted(options, key=lambda name: name in common)  # a protocol's own options come first
    params: list[click.Parameter] = [
        click.Argument(["models"], nargs=-1, required=True, metavar="MODEL..."),
        *(_option(*options[n]) for n in ordered if n != "models" and options[n][2].on_command_line),
        click.Option(
            ["--dry-run"], is_flag=True, help="Check everything and print the plan; measure nothing."
        ),
    ]
    return click.Command(settings.name, params=params, help=settings.__doc__, callback=_runner(settings.name))


def _option(field: dataclasses.Field, kind: Any, about: Option) -> click.Option:
    """The click option of a setting. What has no default to show is left to the settings when it is not given."""
    default = default_of(field)
    required = default is dataclasses.MISSING
    if isinstance(default, list):
        default = ",".join(default)
    if required or about.unset or default == "":
        default = None
    kinds = kinds_of(kind)
    if about.choices and list[str] not in kinds:
        value: Any = click.Choice(about.choices)
    elif about.file:
        value = click.Path(dir_okay=False)
    else:
        value = next((k for k in (str, float, int) if k in kinds), str)
    return click.Option(
        [f"--{field.name.replace('_', '-')}"],
        type=value,
        default=default if default is None else str(default) if value is str else default,
        show_default=default is not None,
        required=required,
        multiple=about.repeated,
        metavar=about.metavar,
        help=f"{about.help}  [default: {about.unset}]" if about.unset else about.help,
    )


def _runner(name: str):
    def run(dry_run: bool, **given: Any) -> None:
        from kvcat_nemo.evaluate.registry import protocol_class

        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None}
        with friendly_errors():
            run_all({"": protocol_class(name).of(settings)}, dry_run)

    return run


def run_all(protocols: dict[str, Any], dry_run: bool) -> None:
    """Check protocols as a whole, print their plans, and run them unless it is a dry run; names stand above plans."""
    for name, protocol in protocols.items():
        if name:
            click.echo(name, err=not dry_run)
        for line in protocol.check():
            click.echo(f"  {line}" if name else line, err=not dry_run)
    for protocol in protocols.values() if not dry_run else ():
        path = protocol.run()
        click.echo(f"wrote {path}", err=True)
        print_rows(path, protocol.shown)


def print_rows(path: Path, figures: tuple[str, ...]) -> None:
    """The rows of a results file as a table, the named figures alone."""
    import json

    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = [x for x in ("model", "task", "compressor", "budget", *figures) if any(x in row for row in rows)]

    def shown(value):
        return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)

    lines = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(x.ljust(n) for x, n in zip(line, widths, strict=True)).rstrip())
