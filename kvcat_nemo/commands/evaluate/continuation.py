"""`kvcat evaluate continuation`."""

from __future__ import annotations

import click

from kvcat_nemo.commands.evaluate.options import (
    compression_options,
    run_protocol,
    shared_options,
    window_options,
)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@compression_options
@window_options
@click.option("--prefix", default=768, show_default=True, help="Tokens whose cache is compressed.")
@click.option("--continuation", default=256, show_default=True, help="Tokens that follow.")
@shared_options
def command(models, **options):
    """Compress the cache of each window's first part and score its second part, for every MODEL (a Hugging Face
    folder, or NAME=folder), compressor and budget.

    The first token of the continuation is predicted by the uncompressed prefill and is not scored: of 256 tokens that
    follow, 255 are. ppl = exp of the mean NLL over all predictions; delta_ppl = ppl − ppl_dense; kl = KL(dense ‖
    compressed) in nats per token; top1 = agreement of the likeliest token in percent; slots are per layer and KV head.

    \b
    Examples:
      kvcat evaluate continuation models/smollm2-135m --out results/continuation
      kvcat evaluate continuation base=models/smollm2-135m kvcat=results/run/model \\
        --compressors attention-matching,attention-matching+int4,recent:sinks=4,int8@1 --keep 0.05,0.1 \\
        --windows 20 --text my_texts/ --out results/before_after
      kvcat evaluate continuation models/smollm2-135m --windows windows.json --limit 5 --out results/quick
    """
    run_protocol("continuation", models, **options)
