"""`kvcat evaluate needle`."""

from __future__ import annotations

import click

from kvcat_nemo.commands.evaluate.options import (
    compression_options,
    question_options,
    run_protocol,
    shared_options,
)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@compression_options
@click.option("--lengths", default="1024", show_default=True, help="Comma-separated; tokens of the haystack.")
@click.option(
    "--depths", default="0,0.25,0.5,0.75,1", show_default=True, help="Comma-separated; 0 first, 1 last."
)
@click.option("--samples", default=10, show_default=True, help="Keys of each length and depth.")
@question_options
@shared_options(batches=False)
def command(models, **options):
    """Hide a six-digit pass key in a text, compress the text's cache, and ask for the key: accuracy by budget, depth and
    length, for every MODEL (a Hugging Face folder, or NAME=folder).

    \b
    Examples:
      kvcat evaluate needle models/smollm2-135m --keep 0.1,0.3,0.5 --out results/needle
      kvcat evaluate needle base=models/smollm2-135m kvcat=results/run/model --question known \\
        --compressors attention-matching,snapkv --lengths 1024,4096 --samples 20 --out results/needle_known
    """
    run_protocol("needle", models, **options)
