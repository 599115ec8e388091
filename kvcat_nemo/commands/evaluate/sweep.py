"""`kvcat evaluate sweep`."""

from __future__ import annotations

import click

from kvcat_nemo.commands.evaluate.options import run_all
from kvcat_nemo.commands.options import friendly_errors


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.option("--dry-run", is_flag=True, help="Check every run and print the plan; measure nothing.")
@click.option("--only", help="Comma-separated names of the runs to do.  [default: all]")
def command(config, dry_run, only):
    """Run the evaluations that the YAML file CONFIG lists. All of it is checked before any of it starts; a sweep that
    was stopped goes on where it was.

    \b
    CONFIG:
      out: results/sweep            # each run writes out/NAME
      shared:                       # settings of every run that has them
        models: [base=models/smollm2-135m, kvcat=results/run/model]
        threads: 2
      runs:
        - name: curves              # default: the protocol's name
          protocol: continuation
          compressors: [attention-matching, recent:sinks=4, int8@1]
          keep: [0.05, 0.1, 0.2, 0.4]
          windows: 20
        - name: bf16
          protocol: continuation
          dtype: bfloat16
          keep: [0.1]
          windows: windows.json

    The settings of a protocol are its command's options: kvcat evaluate continuation --help.

    \b
    Example:
      kvcat evaluate sweep sweep.yaml --dry-run
    """
    from kvcat_nemo.evaluate.sweep import load_sweep

    with friendly_errors():
        runs = load_sweep(config, only=only.split(",") if only else None)
        run_all(runs, dry_run)
