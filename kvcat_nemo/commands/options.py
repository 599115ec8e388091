"""What several commands share."""

from __future__ import annotations

import contextlib

import click

DTYPES = ("float32", "bfloat16")
SERVED_DTYPES = (*DTYPES, "float16")


def id_options(function):
    """--bos and --special-tokens, as tokens.IdRules."""
    function = special_tokens_option("the document")(function)
    return bos_option("the document", "; in a chat template: as the template has it")(function)


def bos_option(of: str, more: str = ""):
    """--bos, of texts."""
    return click.option(
        "--bos",
        type=click.Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help=f"BOS before {of}: auto: as the model's tokenizer puts it there by itself{more}.",
    )


def special_tokens_option(of: str):
    """--special-tokens, of a text."""
    return click.option(
        "--special-tokens",
        type=click.Choice(["text", "control"]),
        default="text",
        show_default=True,
        help=f"Special tokens that {of} mentions: text, or the control tokens they name.",
    )


@contextlib.contextmanager
def friendly_errors():
    """Errors of the input as one line, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
