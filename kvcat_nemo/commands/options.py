"""What several commands share."""

from __future__ import annotations

import contextlib

import click

DTYPES = ("float32", "bfloat16")


@contextlib.contextmanager
def friendly_errors():
    """Errors of the input as one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
