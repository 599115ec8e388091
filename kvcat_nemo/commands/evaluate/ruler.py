"""`kvcat evaluate ruler`."""

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
@click.option("--tasks", help="Comma-separated.  [default: all seven]")
@compression_options
@click.option("--lengths", default="1024", show_default=True, help="Comma-separated; tokens of the context.")
@click.option("--samples", default=10, show_default=True, help="Examples of each task and length.")
@question_options
@shared_options(batches=False)
def command(models, tasks, **options):
    """RULER-style synthetic tasks over a compressed cache, answered in the model's own words, for every MODEL (a Hugging
    Face folder, or NAME=folder).

    \b
    Tasks:
      niah-single, niah-multikey, niah-multivalue, niah-multiquery   codes hidden in text
      variable-tracking                                              names that share a value through a chain
      common-words, frequent-words                                   what stands most often in a list

    \b
    Examples:
      kvcat evaluate ruler models/smollm2-135m --keep 0.2,0.5 --samples 5 --out results/ruler
      kvcat evaluate ruler models/smollm2-135m --tasks niah-single,variable-tracking --lengths 1024,4096 --out results/r
    """
    if tasks is not None:
        options["tasks"] = tasks
    run_protocol("ruler", models, **options)
