"""`kvcat evaluate base-ability`."""

from __future__ import annotations

import click

from kvcat_nemo.commands.evaluate.options import run_protocol, shared_options


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--tasks", help="Comma-separated.  [default: all six]")
@click.option(
    "--data",
    default="data/benchmarks",
    show_default=True,
    help="Folder of TASK.jsonl files in the benchmarks' own fields; those that are missing are fetched.",
)
@shared_options(batches=16)
def command(models, tasks, **options):
    """HellaSwag, WinoGrande, PIQA, OpenBookQA, ARC-Easy and ARC-Challenge by lm-evaluation-harness, zero-shot, on local
    data: every MODEL (a Hugging Face folder, or NAME=folder), and each compared with the first one item by item.

    --limit N draws N items of each task.

    \b
    Examples:
      kvcat evaluate base-ability models/smollm2-135m --limit 200 --out results/base_ability
      kvcat evaluate base-ability before=models/smollm2-135m after=results/run/model --out results/ability
    """
    if tasks is not None:
        options["tasks"] = tasks
    run_protocol("base-ability", models, **options)
