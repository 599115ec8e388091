"""`kvcat launch`: start a recipe with torchrun, Slurm or Kubernetes. What it runs is always printed."""

from __future__ import annotations

import ast
import os
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import click

from kvcat_nemo.commands.options import friendly_errors

_SHARED = [
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
_CLUSTER = [
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


def _with(*groups):
    def decorate(function):
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return decorate


@click.group()
def command():
    """Start a recipe with torchrun, Slurm or Kubernetes.

    RECIPE is a name of `kvcat train list`, with arguments if it needs some: "kvcat_qwen25_0p5b(base='/ckpt/qwen')".
    What would run is always printed; --dry-run prints and stops.
    """


def training_command(
    recipe: str, overrides: tuple[str, ...], run_dir: Path, nodes: int, procs: int
) -> list[str]:
    """`nemo llm pretrain …` for a recipe in a run folder, on `nodes` × `procs` ranks.

    Raises:
        click.ClickException: when the recipe is not a name or a call with plain values, an override is not a plain value
            (kvcat_nemo.launch.overrides), an argument or override contradicts an option, or one holds credentials.
    """
    from kvcat_nemo.common.redact import refuse_credentials
    from kvcat_nemo.launch.overrides import factory_call, read_override, touches

    try:
        refuse_credentials(
            [recipe, *overrides]
        )  # they are printed, and kept in files; so no message below shows one
        call = ast.parse(recipe.strip(), mode="eval").body
        keywords = [] if isinstance(call, ast.Name) else call.keywords
        name = call.id if isinstance(call, ast.Name) else call.func.id
        if (isinstance(call, ast.Call) and call.args) or any(k.arg is None for k in keywords):
            raise AttributeError
        arguments = {k.arg: _literal(k.value) for k in keywords}
    except (SyntaxError, AttributeError) as error:
        raise click.ClickException(
            f"recipe {recipe!r}: give NAME or \"NAME(base='…', paths='…')\", values by name"
        ) from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for key in ("dir", "name"):
        if key in arguments:
            raise click.ClickException(f"recipe {recipe!r}: {key} comes from --run-dir; leave it out")
    arguments |= {"dir": str(run_dir.parent), "name": run_dir.name}
    try:
        for override in overrides:
            key = read_override(override).key
            for field in ("trainer.devices", "trainer.num_nodes", "log.log_dir", "log.name"):
                if touches(key, field):
                    what = "" if key == field else f" (it sets {field})"
                    raise ValueError(
                        f"{override}: comes from --nodes, --procs-per-node and --run-dir; leave it out{what}"
                    )
            if key.startswith("run"):
                raise ValueError(
                    f"{override}: kvcat launch starts the ranks itself; run.… is for `nemo llm pretrain`"
                )
        factory = factory_call(name, arguments)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    layout = [f"trainer.num_nodes={nodes}", f"trainer.devices={procs}"]
    return ["nemo", "llm", "pretrain", "--factory", factory, "-y", *layout, *overrides]


def _literal(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise AttributeError from None  # a call, or a name


def _recipe_name(recipe: str) -> str:
    return recipe.partition("(")[0].strip()


def _folder(run_dir: str | None, recipe: str) -> Path:
    _check_values({"run-dir": run_dir})
    return Path(os.path.abspath(run_dir or Path("runs") / _recipe_name(recipe)))


def _check_plan(recipe: str, words: list[str]) -> None:
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


def _check_values(values: dict[str, object]) -> None:
    """Hold options against the table of their forms (launch/values.tsv), before anything is built, written or run."""
    from kvcat_nemo.launch.values import check_value, forms

    with friendly_errors():
        for option, value in values.items():
            for one in value if isinstance(value, list | tuple) else [value]:
                if option in forms() and one is not None and one != "":
                    check_value(option, one)


def _run(words: list[str], environment: dict[str, str] | None = None) -> None:
    shown = [f"{key}={shlex.quote(value)}" for key, value in (environment or {}).items()]
    click.echo(" ".join(["+", *shown, shlex.join(words)]), err=True)
    done = subprocess.run(words, env=os.environ | (environment or {}))
    raise SystemExit(done.returncode)


@command.command()
@_with(_SHARED)
@click.option("--node-rank", default=0, show_default=True, help="Number of this node, from 0.")
@click.option("--master-addr", help="Address of node 0; needed with more than one node.")
@click.option(
    "--attempt", help="A word, the same on all nodes and new at each start; with more than one node."
)
@click.option("--dry-run", is_flag=True, help="Print what would run, and stop.")
def local(
    recipe, overrides, run_dir, nodes, procs_per_node, setup, interface, master_port, max_stalled, node_rank,
    master_addr, attempt, dry_run,
):  # fmt: skip
    """Run RECIPE on this machine with torchrun, or this machine's part of it on many.

    SIGTERM, SIGUSR1 and Ctrl-C ask for a last save; exit code 75 then says: start it again to go on.

    \b
    Examples:
      kvcat launch local kvcat_tiny trainer.max_steps=10
      kvcat launch local kvcat_tiny --procs-per-node 2 trainer.strategy.tensor_model_parallel_size=2 --dry-run
    """
    from kvcat_nemo.launch import HERE

    folder = _folder(run_dir, recipe)
    procs = procs_per_node or 1
    _check_values(
        {
            "run-dir": folder,
            "setup": setup,
            "interface": interface,
            "max-stalled": max_stalled,
            "node-rank": node_rank,
        }
        | {"master-addr": master_addr, "attempt": attempt, "nodes": nodes, "procs-per-node": procs}
    )
    words = training_command(recipe, overrides, folder, nodes, procs)
    environment = {
        "KVCAT_RUN_DIR": str(folder),
        "KVCAT_NODES": str(nodes),
        "KVCAT_PROCS_PER_NODE": str(procs),
        "KVCAT_NODE_RANK": str(node_rank),
        "KVCAT_MAX_STALLED": str(max_stalled),
        "KVCAT_MASTER_ADDR": master_addr,
        "KVCAT_MASTER_PORT": master_port and str(master_port),
        "KVCAT_ATTEMPT": attempt,
        "KVCAT_SETUP": setup,
        "KVCAT_INTERFACE": interface,
    }
    options = ["--dry-run"] if dry_run else []
    _run(
        ["bash", str(HERE / "torchrun.sh"), *options, "--", *words],
        {k: v for k, v in environment.items() if v},
    )


@command.command()
@_with(_SHARED, _CLUSTER)
@click.option("--time", "limit", default="04:00:00", show_default=True, help="Time limit of one attempt.")
@click.option("--partition", help="As sbatch's.")
@click.option("--account", help="As sbatch's.")
@click.option("--qos", help="As sbatch's.")
@click.option("--constraint", help="As sbatch's.")
@click.option("--exclude", help="Nodes to stay away from; as sbatch's.")
@click.option("--exclusive", is_flag=True, help="Take whole nodes.")
@click.option("--cpus-per-node", type=click.IntRange(1), help="CPUs for the ranks of a node.")
@click.option("--ib-hca", help="InfiniBand adapters for NCCL (NCCL_IB_HCA).")
@click.option("--stop-seconds", type=click.IntRange(1), help="Give up on a last save after this.")
@click.option("--restart-on-failure", is_flag=True, help="Queue again after a failure, too.")
@click.option(
    "--health-command",
    default='kvcat train doctor --dir "$KVCAT_RUN_DIR" --disk-gb "$KVCAT_MIN_DISK_GB" --timeout 120',
    show_default=True,
    help="A check on every node before the start; '' for none.",
)
@click.option("--health-seconds", default=300, show_default=True, help="Time for all checks.")
@click.option(
    "--min-disk-gb", default=20, show_default=True, help="Free space that the run's folder must have."
)
@click.option(
    "--exit-wait", default=60, show_default=True, help="Seconds other nodes get once one has ended."
)
@click.option("--dry-run", is_flag=True, help="Print script and environment, and submit nothing.")
def slurm(
    recipe, overrides, run_dir, nodes, procs_per_node, setup, interface, master_port, max_stalled, gpus_per_node,
    name, image, mounts, env, signal_seconds, plan, dry_run, limit, **others,
):  # fmt: skip
    """Submit RECIPE to a Slurm cluster; it goes on by itself after preemption, time limits and lost nodes.

    \b
    Examples:
      kvcat launch slurm kvcat_tiny --nodes 2 --gpus-per-node 0 --dry-run
      kvcat launch slurm "kvcat_llama31_8b(base='/ckpt/llama', paths='/data/corpus')" --run-dir /shared/runs/llama \\
        --nodes 8 --image /shared/kvcat.sqsh --mount /ckpt:/ckpt --mount /data:/data
    """
    from kvcat_nemo.launch import HERE
    from kvcat_nemo.launch.job_settings import check_variables

    folder = _folder(run_dir, recipe)
    procs = procs_per_node or gpus_per_node or 1
    values = {
        "run-dir": folder,
        "nodes": nodes,
        "gpus-per-node": gpus_per_node,
        "procs-per-node": procs,
        "job-name": name,
        "time": limit,
        "image": image,
        "setup": setup,
        "interface": interface,
        "master-port": master_port,
        "signal-seconds": signal_seconds,
        "max-stalled": max_stalled,
    } | {key.replace("_", "-"): value for key, value in others.items()}
    _check_values(
        {key: value for key, value in values.items() if not isinstance(value, bool)} | {"mount": mounts}
    )
    with friendly_errors():
        check_variables(env)
    training = training_command(recipe, overrides, folder, nodes, procs)
    if plan or (plan is None and not dry_run):
        _check_plan(recipe, training)
    words = ["bash", str(HERE / "submit.sh")]
    for key, value in values.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not None and value is not False and value != "":  # 0 is a value
            words.append(f"--{key}={value}")
    for key, entries in (("mount", mounts), ("env", env)):
        words += [f"--{key}={entry}" for entry in entries]
    _run([*words, *(["--dry-run"] if dry_run else []), "--", *training])


@command.command()
@_with(_SHARED, _CLUSTER)
@click.option("--max-restarts", default=10, show_default=True, help="Restarts after failures.")
@click.option("--patch", type=click.Path(exists=True, dir_okay=False), help="YAML laid over the manifest.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the manifest here. [default: print it]")
@click.option("--dry-run", is_flag=True, help="Print the manifest, and write nothing.")
def k8s(
    recipe, overrides, run_dir, nodes, procs_per_node, setup, interface, master_port, max_stalled, gpus_per_node,
    name, image, mounts, env, signal_seconds, plan, dry_run, max_restarts, patch, out,
):  # fmt: skip
    """Write RECIPE as a Kubernetes JobSet, checked against JobSet's schema; kubectl apply starts it.

    The run's folder must lie in a mount. A variable given by --env NAME comes from the secret JOB-env.

    \b
    Example:
      kvcat launch k8s kvcat_tiny --run-dir /runs/tiny --nodes 2 --image kvcat:1 --mount runs:/runs --out tiny.yaml
    """
    import yaml

    from kvcat_nemo.common.files import new_file
    from kvcat_nemo.launch.job_settings import Settings
    from kvcat_nemo.launch.jobset import default_name, jobset, merge, refuse_secrets_in, validate

    folder = _folder(run_dir, recipe)
    procs = procs_per_node or gpus_per_node or 1
    training = training_command(recipe, overrides, folder, nodes, procs)
    _check_values({"max-restarts": max_restarts})
    try:
        settings = Settings(
            command=training,
            run_dir=folder,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            procs_per_node=procs,
            name=name or default_name(folder),
            image=image,
            mounts=list(mounts),
            env=list(env),
            setup=setup,
            interface=interface,
            master_port=master_port,
            signal_seconds=signal_seconds,
            max_stalled=max_stalled,
        )
        manifest = jobset(settings, max_restarts=max_restarts)
        if patch:
            manifest = merge(manifest, yaml.safe_load(Path(patch).read_text(encoding="utf-8")))
        refuse_secrets_in(manifest)
        if plan or (plan is None and not dry_run):
            _check_plan(recipe, training)
        validate(manifest)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    except ImportError:
        click.echo("not checked against JobSet's schema: pip install 'kvcat-nemo[k8s]'", err=True)
    text = yaml.safe_dump(manifest, sort_keys=False, width=200)
    click.echo(f"+ {shlex.join(training)}", err=True)
    if out and not dry_run:
        with new_file(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        click.echo(f"start it: kubectl apply -f {shlex.quote(out)}", err=True)
    else:
        click.echo(text, nl=False)
