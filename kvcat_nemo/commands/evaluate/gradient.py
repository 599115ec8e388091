"""`kvcat evaluate gradient`."""

from __future__ import annotations

import click

from kvcat_nemo.commands.evaluate.options import run_protocol, shared_options, window_options


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--compressors",
    default="recent:sinks=4",
    show_default=True,
    help="Comma-separated; whose slots are trained, unquantised.",
)
@click.option(
    "--keep",
    default="0.05",
    show_default=True,
    help="Comma-separated budgets: 0.05 (fraction) or 38t (slots).",
)
@click.option("--steps", default=30, show_default=True, help="Adam steps.")
@click.option("--lr", default=0.02, show_default=True, help="Relative to the size of keys and values.")
@click.option("--every", default=1, show_default=True, help="Score after every so many steps.")
@click.option(
    "--lessons",
    type=click.Choice(["continuation", "repeat", "sample"]),
    default="continuation",
    show_default=True,
    help="What the slots learn: the tokens that are scored, the prefix once more, or the model's own text.",
)
@click.option("--lesson-count", default=2, show_default=True, help="Texts, for repeat and sample.")
@click.option(
    "--lesson-tokens", default=128, show_default=True, help="Tokens of each, for repeat and sample."
)
@window_options
@click.option("--prefix", default=768, show_default=True, help="Tokens whose cache is compressed.")
@click.option("--continuation", default=256, show_default=True, help="Tokens that follow.")
@shared_options
def command(models, **options):
    """Train the slots of a small cache until it says what the full one says, and log ΔPPL after every step.

    With several MODELs, speed_up is the first model's steps divided by the step at which another one is as good as the
    first one is at its end. This is slow: each step passes the continuation forwards and backwards.

    \b
    Examples:
      kvcat evaluate gradient base=models/smollm2-135m kvcat=results/run/model --windows 4 --out results/gradient
      kvcat evaluate gradient models/smollm2-135m --lessons repeat --keep 0.1 --steps 50 --every 5 --out results/g
    """
    run_protocol("gradient", models, **options)
