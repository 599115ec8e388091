"""`kvcat train`: plan and check training runs. Training itself is `nemo llm pretrain --factory NAME`."""

from __future__ import annotations

import click


@click.group()
def command():
    """Plan and check training runs (which `nemo llm pretrain --factory NAME` starts)."""


def _recipe(name: str, overrides: tuple[str, ...]):
    import difflib

    from kvcat_nemo.recipes import RECIPES  # an import error of a recipe is the user's to see

    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(RECIPES)}"
        raise click.ClickException(f"no recipe {name!r}; {hint}")
    from nemo_run.cli.cli_parser import parse_cli_args

    from kvcat_nemo.recipes.overrides import check_overrides

    recipe = RECIPES[name]()
    try:
        check_overrides(recipe, overrides)
        return parse_cli_args(recipe, list(overrides))
    except Exception as error:
        raise click.ClickException(str(error)) from error


@command.command("list")
def list_recipes():
    """List the recipes with a line on each."""
    from kvcat_nemo.recipes import RECIPES

    for name, function in RECIPES.items():
        click.echo(f"{name:<22}{(function.__doc__ or '').strip().splitlines()[0]}")


@command.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(name, overrides, as_json):
    """Validate recipe NAME and print what it would need, without starting anything.

    Takes the same overrides as `nemo llm pretrain`. Memory is for bf16 on GPUs, an estimate.

    \b
    Examples:
      kvcat train plan kvcat_qwen25_0p5b
      kvcat train plan kvcat_llama31_8b trainer.num_nodes=64 data.global_batch_size=512
    """
    import json

    recipe = _recipe(name, overrides)
    from kvcat_nemo.nemo.plan import plan as make_plan

    try:
        out = make_plan(recipe)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(out, indent=2))
        return
    layout, parts, memory = out["layout"], out["parameters"], out["memory_per_gpu_bytes"]
    rows = [
        (
            "parameters",
            f"{parts['total']:,} ({parts['routers']:,} of them in routers, which the export drops)",
        ),
        ("policy", f"{out['policy']}; routers at layers {', '.join(map(str, out['router_layers'])) or '—'}"),
        (
            "layout",
            f"{layout['world_size']} processes = tensor {layout['tensor']} × pipeline {layout['pipeline']} × data {layout['data']}"
            + (", sequence-parallel" if layout["sequence_parallel"] else ""),
        ),
        (
            "batch",
            f"{layout['global_batch_size']} windows of {layout['seq_length']} tokens, in {layout['num_microbatches']} "
            f"micro-batch(es) of {layout['micro_batch_size']} per rank, each passed dense and masked",
        ),
        ("tokens", f"{out['tokens_per_step']:,} a step, {out['tokens']:,} in {out['steps']:,} steps"),
        (
            "FLOPs",
            f"{out['flops_per_step']:.3g} a step, {out['flops_per_step'] / layout['world_size']:.3g} per process",
        ),
        (
            "memory per GPU",
            f"{memory['total'] / 1e9:.1f} GB: "
            + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in memory.items() if k != "total"),
        ),
    ]
    for label, text in rows:
        click.echo(f"{label:<16}{text}")


@command.command()
@click.argument("folder", type=click.Path())
@click.option("--once", is_flag=True, help="Print the run as it is now, and end.")
@click.option("--every", default=2.0, show_default=True, help="Seconds between looks.")
def watch(folder, once, every):
    """Watch the training run in FOLDER from its files, without touching the job.

    FOLDER is the run's (with checkpoints/ and kvcat/ in it); it may not exist yet. Shows loss parts, keep rate per router,
    tokens/s, time left, the last checkpoint, and whether the run is still alive. Ends with the run, or by Ctrl-C.

    \b
    Examples:
      kvcat train watch runs/kvcat_qwen25_0p5b
      kvcat train watch runs/kvcat_qwen25_0p5b --once
    """
    from pathlib import Path

    from rich.console import Console
    from rich.live import Live

    from kvcat_nemo.watch.loop import follow
    from kvcat_nemo.watch.state import RunWatcher
    from kvcat_nemo.watch.view import render

    if every <= 0:
        raise click.ClickException(f"--every {every:g}: give a positive number of seconds")
    console, watcher = Console(), RunWatcher(Path(folder))
    if once or not console.is_terminal:
        console.print(render(watcher.snapshot(), console.width))
        return
    with Live(console=console, auto_refresh=False, screen=False) as live:
        follow(watcher, lambda run: live.update(render(run, console.width), refresh=True), every)


@command.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--experiment", default="kvcat", show_default=True, help="MLflow experiment.")
@click.option("--uri", help="MLflow store; by default MLFLOW_TRACKING_URI, or mlflow.db in this folder.")
def track(folder, experiment, uri):
    """Bring the finished or stopped run in FOLDER to MLflow: what the store missed, no step twice.

    For a store that was away when the run ended, or that compute nodes cannot reach.

    \b
    Examples:
      kvcat train track runs/kvcat_qwen25_0p5b
      kvcat train track runs/kvcat_qwen25_0p5b --uri http://mlflow.example:5000
    """
    from pathlib import Path

    from kvcat_nemo.commands.options import friendly_errors
    from kvcat_nemo.tracking.afterwards import bring
    from kvcat_nemo.tracking.redact import redact

    with friendly_errors():
        run_id, where = bring(Path(folder), experiment=experiment, uri=uri)
    click.echo(f"run {run_id} in {redact(where)}")
