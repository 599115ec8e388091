"""NeMo-Run executors for people who prefer `nemo llm pretrain … run.executor=…` to `kvcat launch`.

    run.executor=kvcat_nemo.nemo.executors.torchrun   run.executor.ntasks_per_node=2
    run.executor=kvcat_nemo.nemo.executors.slurm      run.executor.partition=gpu run.executor.nodes=2 …

They start a run, no more: preemption, requeueing, the node check, a log per rank and the name of a failed node are
`kvcat launch`'s. NeMo-Run's own preemption plugin sends its signal to torchrun, which ends the ranks before they have saved.
"""

import os

import nemo_run as run

from kvcat_nemo.launch.values import check_environment


def torchrun() -> run.Config[run.LocalExecutor]:
    """Ranks on this machine. NeMo-Run's own executor of this name works only with CUDA."""
    return run.Config(run.LocalExecutor, ntasks_per_node=1, launcher="torchrun")


def slurm() -> run.Config[run.SlurmExecutor]:
    """A Slurm cluster, submitted to from one of its nodes; on CPU nodes set gpus_per_node to None."""
    # NeMo-Run writes them into its batch script as they are.
    check_environment(os.environ, "SBATCH_ACCOUNT", "SBATCH_PARTITION")
    home = os.environ.get("NEMORUN_HOME", os.path.expanduser("~/.nemo_run"))
    return run.Config(
        run.SlurmExecutor,
        account=os.environ.get("SBATCH_ACCOUNT", ""),
        partition=os.environ.get("SBATCH_PARTITION"),
        nodes=1,
        ntasks_per_node=8,
        gpus_per_node=8,
        time="04:00:00",
        launcher="torchrun",
        packager=run.Config(
            run.Packager
        ),  # the package is installed on the nodes or in the image: nothing to copy
        # NeMo-Run's own folder of experiments: its tunnel copies nothing to another.
        tunnel=run.Config(run.LocalTunnel, job_dir=os.path.join(home, "experiments")),
    )
