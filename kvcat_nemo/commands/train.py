"""`kvcat train`: plan and check training runs. Training itself is `nemo llm pretrain --factory NAME`."""

from __future__ import annotations

import click


@click.group()
def command():
    """Plan and check training runs (which `nemo llm pretrain --factory NAME` starts)."""


def _recipe(name: str, overrides: tuple[str, ...]):
    import difflib

    from kvcat_nemo.commands.options import friendly_errors
    from kvcat_nemo.launch.overrides import read_override

    with friendly_errors():
        for override in overrides:
            read_override(override)  # before nemo-run, which runs what some of them hold
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

    Takes the overrides of `nemo llm pretrain` whose values are literals, words or texts. nemo-run's parser runs code that a value
    names (os.abort, f(…), Config[…], @file.yaml): here such a value is refused, and `nemo llm pretrain` itself runs it. A word
    that is the name of a factory registered with nemo-run calls that factory. Memory is for bf16 on GPUs, an estimate.

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
        (
            "policy",
            f"{out['policy']}; routers at layers {', '.join(map(str, out['router_layers'])) or '—'}"
            + (
                "; for rows behind a cut alone, {:.3g} to {:.3g} of the slots before it kept".format(
                    *out["prefix_keep"]
                )
                if out["prefix_keep"]
                else ""
            ),
        ),
        (
            "layout",
            f"{layout['world_size']} processes = tensor {layout['tensor']} × pipeline {layout['pipeline']} "
            + (f"× context {layout['context']} " if layout["context"] > 1 else "")
            + f"× data {layout['data']}"
            + (", sequence-parallel" if layout["sequence_parallel"] else "")
            + (", packed documents" if layout["packed_documents"] else ""),
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
        *_base_row(out["base"]),
        (
            "memory per GPU",
            f"{memory['total'] / 1e9:.1f} GB: "
            + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in memory.items() if k != "total"),
        ),
    ]
    for label, text in rows:
        click.echo(f"{label:<16}{text}")


def _base_row(base: dict | None) -> list[tuple[str, str]]:
    if base is None:
        return []
    said = (
        "the recipe's model is the base's"
        if base["compared"]
        else "not here or without a card, so not compared"
    )
    return [("base", f"{base['path']}: {said}")]


@command.command()
@click.option("--dir", "folder", default="runs", help="Where a run would write.", show_default=True)
@click.option("--data", help="A dataset folder of `kvcat data build`, or a prefix (FILE without .bin/.idx).")
@click.option("--checkpoint", help="A run's folder (its newest is what it resumes from), or one checkpoint.")
@click.option(
    "--fast", is_flag=True, help="No hashes, ports and other ranks: for a health check, about two seconds."
)
@click.option("--timeout", default=60.0, help="Seconds for the sum over all ranks.", show_default=True)
@click.option("--disk-gb", default=10.0, help="Free disk expected.", show_default=True)
@click.option("--shm-gb", default=1.0, help="Free shared memory expected.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per check.")
@click.option("--gpu", is_flag=True, help="Prove the GPUs: kernels, losses, training, resuming. Ten minutes.")
@click.option("--parts", metavar="NAME,…", help="With --gpu: only these parts.")
@click.option(
    "--dry-run", is_flag=True, help="With --gpu: list the parts and their expected minutes, and stop."
)
@click.option(
    "--report", type=click.Path(dir_okay=False), help="With --gpu: the report. [default: DIR/gpu-doctor.json]"
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False),
    help="With --gpu: a Hugging Face folder for the part `converted`; by default a random model.",
)
def doctor(
    folder, data, checkpoint, fast, timeout, disk_gb, shm_gb, as_json, gpu, parts, dry_run, report, model
):
    """Look whether this machine, or all machines of a job, can train; the exit code is 1 when something is broken.

    Says of each thing what was found and, if it is broken, what to do: versions of NeMo and Megatron-core that work
    together, GPUs, free disk and shared memory, the port of rank 0, data files and checkpoints (with their hashes), whether
    Transformer Engine, apex and flash-attn are there and what that means. `note` is worth knowing, `BROKEN` must be mended.

    Under torchrun (or with RANK, WORLD_SIZE, MASTER_ADDR set, or in a Slurm step) all ranks sum a number, over gloo and,
    with GPUs, over NCCL. Ranks that have not answered after --timeout are named with their hosts; where nothing else is
    wrong, the exit code is 69. Rank 0 prints everything, the others what is broken with them.

    With --gpu it proves this machine's GPUs instead, part by part, and writes a JSON report: 0 when every part is ok, 1 when
    one failed, 3 when none failed but one could not run here (the report says why). On a machine with one GPU the parts for
    two are listed as skipped, and do not count.

    \b
    Examples:
      kvcat train doctor
      kvcat train doctor --gpu
      kvcat train doctor --gpu --parts kernels,losses --report report.json
      kvcat train doctor --data data/corpus --checkpoint runs/first
      torchrun --nnodes 2 --nproc-per-node 8 … -m kvcat_nemo.cli train doctor --timeout 120
    In a Dockerfile:
      HEALTHCHECK CMD kvcat train doctor --fast --dir /runs
    """
    import json
    import os
    import socket
    import sys
    from pathlib import Path

    if gpu:
        sys.exit(_gpu_doctor(Path(folder), parts, dry_run, report, model, as_json))
    for given, option in (
        (parts, "--parts"),
        (dry_run, "--dry-run"),
        (report, "--report"),
        (model, "--model"),
    ):
        if given:
            raise click.UsageError(f"{option} goes with --gpu; add it")
    from kvcat_nemo.doctor import BROKEN, examine
    from kvcat_nemo.runs.exit_codes import PEER_DIED

    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    broken = elsewhere = 0
    for verdict in examine(
        folder=Path(folder),
        data=data,
        checkpoints=checkpoint,
        fast=fast,
        disk_gb=disk_gb,
        shm_gb=shm_gb,
        seconds=timeout,
    ):
        broken += verdict.status == BROKEN
        elsewhere += verdict.elsewhere
        if rank and verdict.status != BROKEN:
            continue
        if as_json:
            click.echo(json.dumps({"rank": rank, "host": socket.gethostname()} | vars(verdict)))
        else:
            origin = f"[rank {rank}, {socket.gethostname()}] " if rank else ""
            click.echo(f"{origin}{verdict.status:<7}{verdict.check:<20}{verdict.text}")
    if broken:
        click.echo(f"{broken} thing(s) broken on rank {rank}", err=True)
        sys.exit(PEER_DIED if elsewhere == broken else 1)


def _gpu_doctor(folder, names, dry_run, report, model, as_json) -> int:
    """The parts of `doctor --gpu`; returns the exit code."""
    import json
    import tempfile
    from pathlib import Path

    from kvcat_nemo.doctor import gpu
    from kvcat_nemo.doctor.report import exit_code, write

    try:
        chosen = gpu.chosen(names)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if dry_run:
        for part in chosen:
            reason = gpu.why_not(part, "cuda")
            note = f"; skipped here: {reason}" if reason else ""
            if as_json:
                click.echo(json.dumps(vars(part) | {"skipped": reason}))
            else:
                click.echo(f"{part.name:<10}{part.minutes:5.1f} min  {part.text}{note}")
        if not as_json:
            click.echo(f"{'together':<10}{sum(part.minutes for part in chosen):5.1f} min")
        return 0
    out = Path(report) if report else folder / "gpu-doctor.json"
    machine, results = gpu.machine(), []
    with tempfile.TemporaryDirectory(prefix="kvcat-doctor-") as work:
        say = (lambda line: click.echo(line, err=True)) if as_json else click.echo
        for result in gpu.run_parts(chosen, Path(work), model=model and Path(model).resolve(), say=say):
            results.append(result)
            write(out, machine, results)
            if as_json:
                click.echo(json.dumps(result.as_dict(), default=str))
            else:
                click.echo(f"{result.status:<8}{result.name:<10}{result.seconds:6.0f} s  {result.text}")
    code = exit_code(results)
    click.echo(f"report: {out}; exit code {code}", err=as_json)
    return code


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
    from kvcat_nemo.common.redact import redact
    from kvcat_nemo.tracking.afterwards import bring

    with friendly_errors():
        run_id, where = bring(Path(folder), experiment=experiment, uri=uri)
    click.echo(f"run {run_id} in {redact(where)}")
