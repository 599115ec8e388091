"""The launchers, one file each: every module here with a click command named `command` is a `kvcat launch …`.

To add one, write its file: take the options from `shared`, make the training command with `shared.training_words`, and start it.
An option's form belongs into launch/values.tsv where a shell script reads it.
"""

from __future__ import annotations

import importlib
import pkgutil

import click


def launchers() -> dict[str, click.Command]:
    """Name → command of every launcher, in the order of the names."""
    modules = [importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)]
    commands = [module.command for module in modules if hasattr(module, "command")]
    return {one.name: one for one in sorted(commands, key=lambda one: one.name)}
