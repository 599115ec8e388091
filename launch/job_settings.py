"""What a launch needs to know, whichever launcher takes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kvcat_nemo.common.redact import ADVICE, refuse_secrets, what_secret
from kvcat_nemo.launch.values import check_value, own_variables


def check_variables(pairs: Iterable[str]) -> None:
    """Refuse variables, NAME or NAME=VALUE, that no environment takes, no file should hold, or an option sets.

    Raises:
        ValueError: naming the variable, without what it holds.
    """
    for pair in pairs:
        name, equals, value = pair.partition("=")
        check_value("env-name", name, shown="env")
        if name in own_variables():
            raise ValueError(f"env={name}: the launcher sets that itself; give the option it stands for")
        what = what_secret(name, value) if equals else None
        if what:
            raise ValueError(
                f"env={name}=…: that looks like a secret ({what}); {ADVICE}. Here: give {name} alone"
            )


@dataclass
class Settings:
    """Settings that Slurm and Kubernetes share. Times are in seconds."""

    command: list[str]
    """What every rank runs."""
    run_dir: Path
    """The run's folder, on storage that all nodes share."""
    nodes: int = 1
    gpus_per_node: int = 8
    """GPUs of each node; 0 for CPU nodes."""
    procs_per_node: int | None = None
    """Ranks on each node; None: one per GPU, or one."""
    name: str | None = None
    """Name of the job; None: that of the run's folder."""
    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    """SOURCE:TARGET, each."""
    env: list[str] = field(default_factory=list)
    """NAME=VALUE, or NAME alone for a value that is written nowhere."""
    setup: str = ""
    """Shell code to run before the command."""
    interface: str = ""
    """Network interface of NCCL and gloo; empty: theirs to choose."""
    master_port: int | None = None
    """Port of the rendezvous; None: the launcher's default."""
    signal_seconds: int = 300
    """Time that ranks get to save when they are asked to stop."""
    max_stalled: int = 3
    """Restarts without a new checkpoint that are allowed."""

    def __post_init__(self):
        if self.procs_per_node is None:
            self.procs_per_node = self.gpus_per_node or 1
        if self.name is None:
            self.name = self.run_dir.name
        self.check()

    def check(self) -> None:
        """Refuse what cannot work.

        Raises:
            ValueError: naming the setting, its value and what to give.
        """
        if not self.command:
            raise ValueError("command=[]: there is nothing to run")
        for name in (
            "run_dir", "nodes", "gpus_per_node", "procs_per_node", "signal_seconds", "max_stalled",
            "image", "setup", "interface", "master_port",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value != "":
                check_value(name.replace("_", "-"), value, shown=name)
        refuse_secrets((f"command, word {n + 1}", word) for n, word in enumerate(self.command))
        if self.gpus_per_node and self.procs_per_node > self.gpus_per_node:
            raise ValueError(
                f"procs_per_node={self.procs_per_node}: more ranks than gpus_per_node={self.gpus_per_node}"
            )
        check_variables(self.env)
