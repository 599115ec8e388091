"""What all launchers share: their common options, and the steps between the command line and the start."""

from __future__ import annotations

import os
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import click

from kvcat_nemo.commands.options import friendly_errors

SHARED = [
    click.argument("recipe"),
    click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
    click.option("--run-dir", help="The run's folder, shared by all nodes. [default: runs/RECIPE]"),
    click.option("--nodes", default=1, show_default=True, type=click.IntRange(1), help="Number of nodes."),
    click.option(
        "--procs-per-node", type=click.IntRange(1), help="Ranks on each node, where not one per GPU."
    ),
    click.option("--setup", default="", help="Shell code to run first on each node, such as an activation."),
    click.option("--interface", default="", help="Network interface for NCCL and gloo."),
    click.option("--master-port", type=click.IntRange(1024, 65535), help="Port of the rendezvous."),
    click.option("--max-stalled", default=3, show_default=True, help="Restarts without a new checkpoint."),
]
"""Options of every launcher."""
CLUSTER = [
    click.option("--gpus-per-node", default=8, show_default=True, help="GPUs of each node; 0: CPU nodes."),
    click.option("--name", help="Name of the job. [default: the run folder's]"),
    click.option("--image", help="Container image."),
    click.option("--mount", "mounts", multiple=True, metavar="SOURCE:TARGET", help="Mount it; repeatable."),
    click.option(
        "--env",
        "env",
        multiple=True,
        metavar="NAME[=VALUE]",
        help="Set for all ranks; NAME alone takes a value that is written nowhere. Repeatable.",
    ),
    click.option("--signal-seconds", default=300, show_default=True, help="Time for a last save."),
    click.option(
        "--plan/--no-plan", default=None, help="Check the recipe first. [default: unless --dry-run]"
    ),
]
"""Options of those that hand a job to a queue."""


def options(*groups):
    """Decorates a launcher's function with groups of options."""

    def decorate(function):
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


def _recipe_name(recipe: str) -> str:
    return recipe.partition("(")[0].strip()


def run_folder(run_dir: str | None, recipe: str) -> Path:
    """The run's folder: --run-dir, or runs/RECIPE."""
    check_values({"run-dir": run_dir})
    return Path(os.path.abspath(run_dir or Path("runs") / _recipe_name(recipe)))


def training_words(
    recipe: str, overrides: tuple[str, ...], run_dir: Path, nodes: int, procs: int
) -> list[str]:
    """As kvcat_nemo.launch.training_command, with errors for the command line."""
    from kvcat_nemo.launch.training_command import training_command

    with friendly_errors():
        return training_command(recipe, overrides, run_dir, nodes, procs)


def check_plan(recipe: str, words: list[str]) -> None:
    """Build and check the recipe here, so that a misspelt override fails now and not when its turn in the queue comes."""
    if find_spec("nemo") is None:
        click.echo("not checked: NeMo is not installed here (kvcat train plan checks a recipe)", err=True)
        return
    from kvcat_nemo.commands.train import _recipe
    from kvcat_nemo.nemo.plan import plan

    try:
        out = plan(_recipe(_recipe_name(recipe), tuple(words[words.index("-y") + 1 :])))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    memory = out["memory_per_gpu_bytes"]["total"] / 1e9
    click.echo(
        f"checked: {out['layout']['world_size']} ranks, {memory:.1f} GB each (estimate for bf16)", err=True
    )


def check_values(values: dict[str, object]) -> None:
    """Hold options against the table of their forms (launch/values.tsv), before anything is built, written or run."""
    from kvcat_nemo.launch.values import check_value, forms

    with friendly_errors():
        for option, value in values.items():
            for one in value if isinstance(value, list | tuple) else [value]:
                if option in forms() and one is not None and one != "":
                    check_value(option, one)


def run_script(words: list[str], environment: dict[str, str] | None = None) -> None:
    """Print a command and the variables it gets, run it, and end with its exit code."""
    shown = [f"{key}={shlex.quote(value)}" for key, value in (environment or {}).items()]
    click.echo(" ".join(["+", *shown, shlex.join(words)]), err=True)
    done = subprocess.run(words, env=os.environ | (environment or {}))
    raise SystemExit(done.returncode)
