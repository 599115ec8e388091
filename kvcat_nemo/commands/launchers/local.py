"""`kvcat launch local`: this machine's ranks, with torchrun."""

from __future__ import annotations

import click

from kvcat_nemo.commands.launchers.shared import (
    SHARED,
    check_values,
    options,
    run_folder,
    run_script,
    training_words,
)


@click.command("local")
@options(SHARED)
@click.option("--node-rank", default=0, show_default=True, help="Number of this node, from 0.")
@click.option("--master-addr", help="Address of node 0; needed with more than one node.")
@click.option(
    "--attempt", help="A word, the same on all nodes and new at each start; with more than one node."
)
@click.option("--dry-run", is_flag=True, help="Print what would run, and stop.")
def command(
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

    folder = run_folder(run_dir, recipe)
    procs = procs_per_node or 1
    check_values(
        {
            "run-dir": folder,
            "setup": setup,
            "interface": interface,
            "max-stalled": max_stalled,
            "node-rank": node_rank,
        }
        | {"master-addr": master_addr, "attempt": attempt, "nodes": nodes, "procs-per-node": procs}
    )
    words = training_words(recipe, overrides, folder, nodes, procs)
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
    dry = ["--dry-run"] if dry_run else []
    run_script(
        ["bash", str(HERE / "torchrun.sh"), *dry, "--", *words],
        {k: v for k, v in environment.items() if v},
    )
