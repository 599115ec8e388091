"""Every name that a run's folder may hold. Writers and readers take the names from here; the launch scripts from launch/run_names.sh.

    RUN/
      kvcat_base.json           where config and tokenizer of the base come from
      checkpoints/              step=N …, last → the newest complete one
        step=N-unfinished       a marker beside a checkpoint while it is written or removed
        step=N-broken/          a damaged checkpoint that was set aside
        step=N/                 one checkpoint
          weights/ context/     Megatron's distributed checkpoint; NeMo's description
          kvcat_model.json      which function of the model was trained
          kvcat_seal.json       the manifest: size and hash of every file; with it the checkpoint is complete
          kvcat_score.json      the validation after this step
      kvcat/                    the run's own records
        metrics.jsonl           a line for every step and validation: what all other figures are made from
        config.json, config.yaml, manifest.json, data_order.json
        losses.png              a picture of the figures
        mlflow_run.json         the MLflow run that a resumed job goes on with
        finished.json           once the last step's checkpoint is on disk
        stopped.json            once the run was asked to stop, and saved
      launch/                   the launch scripts' state (launch/common.sh)

An imported base model (`kvcat convert import`) has weights/, hf/ and kvcat_checkpoint.json, and a manifest of the same form.
Standard library alone: the launch scripts ask this package on hosts that have nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvcat_nemo.runs import exit_codes

# --- in the run's folder ---
CHECKPOINTS = "checkpoints"
RECORDS = "kvcat"
"""The run's own records. (NeMo moves loose files of a run's folder away at every start.)"""
LAUNCH = "launch"
BASE = "kvcat_base.json"
"""{"base": folder}: where config and tokenizer come from. A user may lay one into a checkpoint, too."""

# --- in RECORDS ---
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE, CONFIG_YAML = "config.json", "config.yaml"
PROVENANCE_FILE = "manifest.json"
"""Versions, revision, machine, configuration: kvcat_nemo.runs.provenance."""
ORDER_FILE = "data_order.json"
LOSSES_PICTURE = "losses.png"
RUN_FILE = "mlflow_run.json"
FINISHED, STOPPED = "finished.json", "stopped.json"

# --- in CHECKPOINTS ---
LAST = "last"
"""Symbolic link to the newest complete checkpoint."""
UNFINISHED = "-unfinished"
"""Ending of the marker beside a checkpoint's folder while it is written or removed (NeMo's name for it)."""
BROKEN = "-broken"
"""Ending of a damaged checkpoint's folder that was set aside."""

# --- in a checkpoint, an imported base or an exported model ---
WEIGHTS, CONTEXT, HF = "weights", "context", "hf"
MANIFEST = "kvcat_seal.json"
"""The checkpoint manifest. The file keeps the name that older versions gave it, so each version reads the other's checkpoints."""
SCORE = "kvcat_score.json"
RECORD = "kvcat_model.json"
CARD = "kvcat_checkpoint.json"
HASHES = ".hashes-"
"""Beginning of the name of a file in which a writing process leaves its hashes, until the manifest has them."""

_SHELL = {
    "CHECKPOINTS": CHECKPOINTS,
    "LAUNCH": LAUNCH,
    "MANIFEST": MANIFEST,
    "UNFINISHED": UNFINISHED,
    "BROKEN": BROKEN,
    "FINISHED": f"{RECORDS}/{FINISHED}",
    # What the launch scripts keep in LAUNCH.
    "SUBMITTED": f"{LAUNCH}/submitted",
    "ATTEMPTS": f"{LAUNCH}/attempts.tsv",
    "JOB_SCRIPT": f"{LAUNCH}/job.sbatch",
    "SCRIPTS": f"{LAUNCH}/bin",
    "ATTEMPT": f"{LAUNCH}/attempt-",
    # And in an attempt's folder.
    "EXITS": "exit",
    "HEALTH": "health",
    "NCCL": "nccl",
    "STOP": "stop",
}
"""Name of a shell variable, without RUN_ → path within the run's folder, name, or ending of a name."""


def shell_names() -> str:
    """Text of launch/run_names.sh: the names and exit codes that the launch scripts need."""
    lines = [
        "#!/usr/bin/env bash",
        "# Names within a run's folder, and exit codes. Made by: python -m kvcat_nemo.runs --shell-names > launch/run_names.sh",
        "# shellcheck disable=SC2034 # the scripts that source common.sh use them",
        *(f"readonly RUN_{name}={value}" for name, value in _SHELL.items()),
        "# A process that was asked to stop, saved and wants to be started again (EX_TEMPFAIL of sysexits.h).",
        f"readonly KVCAT_EXIT_AGAIN={exit_codes.REQUEUE}",
        "# One that ended because another did (EX_UNAVAILABLE).",
        f"readonly KVCAT_EXIT_PEER_DIED={exit_codes.PEER_DIED}",
    ]
    return "\n".join(lines) + "\n"


class RunFolder:
    """A run's folder: where its files are, whether they exist or not."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / CHECKPOINTS
        self.records = self.path / RECORDS
        self.metrics = self.records / METRICS_FILE
        self.config = self.records / CONFIG_FILE
        self.provenance = self.records / PROVENANCE_FILE
        self.order = self.records / ORDER_FILE
        self.picture = self.records / LOSSES_PICTURE
        self.mlflow_run = self.records / RUN_FILE
        self.finished = self.records / FINISHED
        self.stopped = self.records / STOPPED
        self.base = self.path / BASE

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> RunFolder:
        """The run that a checkpoint lies in, RUN/checkpoints/step=N."""
        return cls(Path(checkpoint).parent.parent)

    def finished_at(self) -> int | None:
        """The last step of a run whose last checkpoint is on disk; None for one that has not ended, or a record that cannot be read."""
        try:
            step = read_record(self.finished).get("step")
        except (OSError, ValueError):
            return None
        return step if type(step) is int else None


def max_steps_of(config: dict[str, Any]) -> int | None:
    """How many steps a run was to make, from its recorded configuration (RunFolder.config); None when it does not say."""
    trainer = config.get("trainer")
    steps = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return steps if type(steps) is int else None


def read_record(path: Path) -> dict[str, Any]:
    """One of a run's JSON records; empty when the file is not there.

    Raises:
        ValueError: naming the file, when it holds no JSON object; what then helps is to restore or remove it.
        OSError: when the file system does not give it.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        found = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): put it back from a copy, or move it away") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} is damaged (it holds no JSON object): put it back from a copy, or move it away"
        )
    return found
