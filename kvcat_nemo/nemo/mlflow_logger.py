"""MLflow as a logger of a NeMo run: what Lightning calls, put into an outbox."""

import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from nemo.utils import AppState
from nemo.utils import logging as nemo_logging

from kvcat_nemo.common.redact import redact, refuse_credentials
from kvcat_nemo.runs.layout import METRICS_FILE, RUN_FILE, RunFolder
from kvcat_nemo.runs.metrics_file import MetricsFile, write_atomically
from kvcat_nemo.tracking.mlflow_run import MlflowRun, figures_of, store_uri
from kvcat_nemo.tracking.outbox import Figure, Outbox
from kvcat_nemo.tracking.system import SystemSampler

__all__ = ["METRICS_FILE", "RUN_FILE", "MLflowTracker", "MetricsFile", "run_folder", "write_atomically"]

CLOSE_SECONDS = 20.0
# A local file does not hang, and a short run's end must wait until a new database has its tables.
CLOSE_SECONDS_LOCAL = 180.0


def run_folder() -> Path:
    """The run's own folder in NeMo's log directory (whose loose files NeMo moves away at every start)."""
    folder = RunFolder(AppState().log_dir).records
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _ToNeMo(logging.Handler):
    """Messages of tracking and of the metrics file, in the console and the log files that NeMo keeps."""

    def emit(self, record: logging.LogRecord) -> None:
        say = nemo_logging.warning if record.levelno >= logging.WARNING else nemo_logging.info
        say(record.getMessage())


def _speak_through_nemo() -> None:
    for room in ("kvcat_nemo.tracking", "kvcat_nemo.runs"):  # the latter has the metrics file
        ours = logging.getLogger(room)
        if not any(isinstance(handler, _ToNeMo) for handler in ours.handlers):
            ours.addHandler(_ToNeMo())
            ours.setLevel(logging.INFO)
            ours.propagate = False


class MLflowTracker(Logger):
    """MLflow, in the background: one run per training even over requeues, no step in it twice, the first rank alone writes.

    Args:
        experiment: MLflow experiment; created when missing.
        tracking_uri: an MLflow store; None takes MLFLOW_TRACKING_URI, or the local file `mlflow.db`.
        system_metrics: sample CPU, memory, disk, network and GPUs of the first rank's node.

    A store that fails neither stops nor slows training. It is reported once; what it missed it gets when it comes back, or
    at the next start, or by `kvcat train track`.

    Raises:
        ValueError: when `tracking_uri` holds a password.
    """

    def __init__(
        self,
        experiment: str = "kvcat",
        tracking_uri: Optional[str] = None,
        system_metrics: bool = True,
    ):
        super().__init__()
        if tracking_uri is not None and redact(tracking_uri) != tracking_uri:
            refuse_credentials([f"tracking_uri={tracking_uri}"])  # configurations are written to checkpoints
        self._experiment_name = experiment
        self._uri = store_uri(tracking_uri)
        self._system_metrics = system_metrics
        self._outbox: Optional[Outbox] = None
        self._sampler: Optional[SystemSampler] = None
        self._run: Optional[MlflowRun] = None
        self.complete = False
        """Whether the training reached its last step: only then its run ends as FINISHED."""

    @property
    def name(self) -> Optional[str]:
        return self._experiment_name

    @property
    def version(self) -> Optional[str]:
        return self._run.run_id if self._run else None

    @property
    def save_dir(self) -> None:
        return None

    def after_save_checkpoint(self, checkpoint_callback) -> None:
        """Checkpoints stay where they are; they are too large for a tracking server."""

    def _box(self) -> Outbox:
        # At the first figure and not before: then NeMo has decided where the run's folder is.
        if self._outbox is None:
            _speak_through_nemo()
            self._run = MlflowRun(
                run_folder(), uri=self._uri, experiment=self._experiment_name, name=AppState().name
            )
            self._outbox = Outbox(self._run, name=f"MLflow ({redact(self._uri)})")
            if self._system_metrics:
                self._sampler = SystemSampler(self._outbox)
                self._sampler.start()
        return self._outbox

    @rank_zero_only
    def log_line(self, line: Mapping[str, Any]) -> None:
        """A line of the metrics file. Its time goes with it, so that the store knows it again."""
        self._box().put(figures_of(line))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: Optional[int] = None) -> None:
        """What Lightning or another callback logs. A step that a metric already has is not logged again."""
        now = int(time.time() * 1000)
        # Lightning counts from 0 what the metrics file counts from 1; the names differ, so both may stay.
        self._box().put(
            Figure(name, float(value), int(step or 0), now)  # Lightning's step may come out of a tensor
            for name, value in metrics.items()
            if math.isfinite(value)
        )

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args, **kwargs) -> None:
        """Parameters; those the run has stay, since MLflow refuses to change one."""
        box = self._box()
        box.do(lambda run=self._run, params=dict(params or {}): run.log_params(params))

    @rank_zero_only
    def log_files(self, *paths: Path) -> None:
        """Attach files to the run."""
        box = self._box()
        box.do(lambda run=self._run: run.log_files(paths))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Send what is left, for a bounded time, and say how the run ended."""
        if self._outbox is None:
            return
        if self._sampler is not None:
            self._sampler.stop()
        end = "FAILED" if status == "failed" else "FINISHED" if self.complete else "KILLED"
        self._outbox.do(lambda run=self._run: run.end(end))
        left = self._outbox.close(CLOSE_SECONDS_LOCAL if self._uri.startswith("sqlite") else CLOSE_SECONDS)
        if left:
            nemo_logging.warning(
                f"MLflow did not take everything in time. {run_folder() / METRICS_FILE} has all figures; when the store is back: "
                f"kvcat train track {os.fspath(run_folder().parent)}"
            )
        self._outbox = self._sampler = None
