"""`kvcat launch`: start a recipe with one of the launchers. What it runs is always printed."""

from __future__ import annotations

import click

from kvcat_nemo.commands.launchers import launchers


@click.group(commands=launchers())
def command():
    """Start a recipe with torchrun, Slurm or Kubernetes.

    RECIPE is a name of `kvcat train list`, with arguments if it needs some: "kvcat_qwen25_0p5b(base='/ckpt/qwen')".
    What would run is always printed; --dry-run prints and stops.
    """
