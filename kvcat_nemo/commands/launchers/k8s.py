"""`kvcat launch k8s`: a Kubernetes JobSet as YAML."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from kvcat_nemo.commands.launchers.shared import (
    CLUSTER,
    SHARED,
    check_plan,
    check_values,
    options,
    run_folder,
    training_words,
)


@click.command("k8s")
@options(SHARED, CLUSTER)
@click.option("--max-restarts", default=10, show_default=True, help="Restarts after failures.")
@click.option("--patch", type=click.Path(exists=True, dir_okay=False), help="YAML laid over the manifest.")
@click.option("--out", type=click.Path(dir_okay=False), help="Write the manifest here. [default: print it]")
@click.option("--dry-run", is_flag=True, help="Print the manifest, and write nothing.")
def command(
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

    folder = run_folder(run_dir, recipe)
    procs = procs_per_node or gpus_per_node or 1
    training = training_words(recipe, overrides, folder, nodes, procs)
    check_values({"max-restarts": max_restarts})
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
            check_plan(recipe, training)
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
