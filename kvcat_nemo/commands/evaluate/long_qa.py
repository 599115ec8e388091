"""`kvcat evaluate long-qa`."""

from __future__ import annotations

import click

from kvcat_nemo.commands.evaluate.options import compression_options, run_protocol, shared_options


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option(
    "--questions",
    type=click.Choice(["qasper", "squad", "longbench-v2"]),
    default="qasper",
    show_default=True,
    help="qasper: yes/no on research papers, fetched; squad: whole articles; longbench-v2: four options.",
)
@click.option(
    "--file",
    type=click.Path(dir_okay=False),
    help="SQuAD 1.1's JSON or bigbench's source package; LongBench v2's JSON.",
)
@click.option(
    "--options",
    type=click.Choice(["letters", "texts"]),
    default="letters",
    show_default=True,
    help="How LongBench's options are answered.",
)
@click.option(
    "--max-tokens", type=int, help="Longer documents lose their middle.  [default: what the model reads]"
)
@compression_options
@shared_options(batches=False)
def command(models, **options):
    """Questions on long documents: the document's cache is compressed, never the question; one compressed document
    answers all its questions. For every MODEL (a Hugging Face folder, or NAME=folder).

    --limit N asks N questions, of as many documents as possible.

    \b
    Examples:
      kvcat evaluate long-qa models/smollm2-135m --limit 40 --keep 0.1,0.5 --out results/qasper
      kvcat evaluate long-qa MODEL --questions longbench-v2 --file data.json --max-tokens 8000 --out results/longbench
    """
    run_protocol("long-qa", models, **options)
