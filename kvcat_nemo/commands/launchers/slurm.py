"""`kvcat launch slurm`: a batch job that goes on by itself."""

from __future__ import annotations

import click

from kvcat_nemo.commands.launchers.shared import (
    CLUSTER,
    SHARED,
    check_plan,
    check_values,
    options,
    run_folder,
    run_script,
    training_words,
)
from kvcat_nemo.commands.options import friendly_errors


@click.command("slurm")
@options(SHARED, CLUSTER)
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
def command(
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

    folder = run_folder(run_dir, recipe)
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
    check_values(
        {key: value for key, value in values.items() if not isinstance(value, bool)} | {"mount": mounts}
    )
    with friendly_errors():
        check_variables(env)
    training = training_words(recipe, overrides, folder, nodes, procs)
    if plan or (plan is None and not dry_run):
        check_plan(recipe, training)
    words = ["bash", str(HERE / "submit.sh")]
    for key, value in values.items():
        if value is True:
            words.append(f"--{key}")
        elif value is not None and value is not False and value != "":  # 0 is a value
            words.append(f"--{key}={value}")
    for key, entries in (("mount", mounts), ("env", env)):
        words += [f"--{key}={entry}" for entry in entries]
    run_script([*words, *(["--dry-run"] if dry_run else []), "--", *training])
