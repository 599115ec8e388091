"""Upper bounds for every numeric option of every command (kvcat_nemo.common.limits), so that none sets an endless loop."""

from __future__ import annotations

import click

from kvcat_nemo.common.limits import check_upper


def bound(command: click.Command) -> click.Command:
    """The command, and those below it, with numbers of options and arguments looked at as they are read."""
    for name in getattr(command, "commands", ()):
        bound(command.commands[name])
    for parameter in command.params:
        numeric = isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType)
        if numeric and not getattr(parameter, "kvcat_bounded", False):
            parameter.kvcat_bounded = True
            parameter.callback = _checked(parameter.callback)
    return command


def _checked(callback):
    def check(ctx, parameter, value):
        if value is not None:
            try:
                check_upper(parameter.name, value, parameter.opts[0])
            except ValueError as error:
                raise click.ClickException(str(error)) from error
        return callback(ctx, parameter, value) if callback else value

    return check
