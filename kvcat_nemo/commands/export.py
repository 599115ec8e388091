"""`kvcat export`: the plain Hugging Face model of a training run."""

from __future__ import annotations

from pathlib import Path

import click

from kvcat_nemo.commands.convert import Size, dtype_option, force_option, unverified_option
from kvcat_nemo.commands.options import friendly_errors


@click.command()
@click.argument("ckpt", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path())
@click.option(
    "--base",
    help="Imported or Hugging Face folder, or hub id, that config and tokenizer come from; by default the one that "
    "kvcat_base.json in the checkpoint or the run names.",
)
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Bytes per file.")
@dtype_option
@force_option
@unverified_option
@click.option(
    "--register",
    metavar="NAME",
    help="Also log the model to the training's MLflow run and register it as NAME.",
)
def command(ckpt, out, base, max_shard_size, dtype, force, unverified, register):
    """Write the plain Hugging Face model of a training checkpoint CKPT to the folder OUT.

    CKPT is a NeMo checkpoint or a run folder, of which the newest finished checkpoint is taken. Its files are
    compared with its manifest first. The result has no router in it and loads with transformers.

    \b
    Examples:
      kvcat export results/run exported/mine
      kvcat export results/run/checkpoints/step=100 exported/mine --base checkpoints/smollm2-135m
      kvcat export results/run exported/mine --register qwen25-kvcat
    """
    from kvcat_nemo.conversion.exporting import export_hf
    from kvcat_nemo.conversion.folders import find_weights

    with friendly_errors():
        click.echo(f"checkpoint {find_weights(ckpt, unverified=unverified)}")
        options = dict(base=base, max_shard_size=max_shard_size, dtype=dtype)
        options |= dict(force=force, unverified=unverified)
        click.echo(f"wrote {export_hf(ckpt, out, **options)}")
        if register:
            from kvcat_nemo.tracking.afterwards import register_model

            version = register_model(Path(out), register, run=Path(ckpt))
            click.echo(f"registered {register}, version {version}")
