"""Where a run's figures go: a JSON-lines file beside the checkpoints, and MLflow."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from nemo.utils import AppState, logging

RUN_FILE = "mlflow_run.json"
METRICS_FILE = "metrics.jsonl"


def run_folder() -> Path:
    """The run's own folder in NeMo's log directory (whose loose files NeMo moves away at every start)."""
    folder = Path(AppState().log_dir) / "kvcat"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name and rename, so that no reader or crash sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class MetricsFile:
    """One JSON object per line. Steps after the one a run resumes from are dropped first, so that none stands twice."""

    def __init__(self, path: Path, resumed_at: int):
        self.path = path
        kept = [line for line in self.lines(path) if line["step"] <= resumed_at]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.steps = {(line["kind"], line["step"]) for line in kept}

    @staticmethod
    def lines(path: Path) -> list[dict[str, Any]]:
        """All complete lines of a metrics file; a last line cut short by a crash is left out."""
        if not path.is_file():
            return []
        out = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                out.append(json.loads(line))
            except ValueError:
                break
        return out

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        clean = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": step} | clean) + "\n")


class MLflowTracker(MLFlowLogger):
    """Lightning's MLflow logger; its run id is kept beside the checkpoints, so a resumed job goes on with the same run.

    Args:
        experiment: MLflow experiment; created when missing.
        tracking_uri: an MLflow store; None takes MLFLOW_TRACKING_URI, or the local file `mlflow.db`.

    A store that fails does not stop training: it is reported once, and the JSON-lines file has all figures.
    """

    def __init__(self, experiment: str = "kvcat", tracking_uri: Optional[str] = None):
        uri = (
            tracking_uri
            or os.environ.get("MLFLOW_TRACKING_URI")
            or f"sqlite:///{Path('mlflow.db').resolve()}"
        )
        if rank_zero_only.rank == 0:
            super().__init__(experiment_name=experiment, tracking_uri=uri)
        else:  # Lightning's would open the store, and ranks that create a new SQLite file together break it
            Logger.__init__(self)
            self._experiment_name, self._experiment_id, self._run_id = experiment, None, None
        self._broken = False
        self._last_step: dict[str, int] = {}

    @property
    def name(self) -> Optional[str]:
        return self._experiment_name

    @property
    def version(self) -> Optional[str]:
        return self._run_id

    @property
    def save_dir(self) -> None:
        return None

    def after_save_checkpoint(self, checkpoint_callback) -> None:
        """Checkpoints stay where they are; they are too large for a tracking server."""

    @property
    @rank_zero_experiment
    def experiment(self):
        if self._initialized:
            return super().experiment
        path = run_folder() / RUN_FILE
        if path.is_file():
            self._run_id = json.loads(path.read_text())["run_id"]
        else:
            self._run_name = AppState().name
        client = super().experiment
        if path.is_file():
            client.update_run(self._run_id, status="RUNNING")
            self._last_step = self._steps_logged(client)
        else:
            write_atomically(path, json.dumps({"run_id": self._run_id}) + "\n")
        return client

    def _steps_logged(self, client) -> dict[str, int]:
        run = client.get_run(self._run_id)
        return {
            name: max((m.step for m in client.get_metric_history(self._run_id, name)), default=-1)
            for name in run.data.metrics
        }

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: Optional[int] = None) -> None:
        """As Lightning's, but a step that a metric already has is not logged again (MLflow would keep both)."""

        def send():
            _ = self.experiment  # first: it reads which steps are there
            at = step or 0
            new = {k: v for k, v in metrics.items() if math.isfinite(v) and at > self._last_step.get(k, -1)}
            if new:
                super(MLflowTracker, self).log_metrics(new, at)
                self._last_step |= dict.fromkeys(new, at)

        self._try(send)

    @rank_zero_only
    def log_hyperparams(self, params: Any = None, *args, **kwargs) -> None:
        """Parameters that the run does not have yet: MLflow refuses to change one."""

        def send():
            have = self.experiment.get_run(self.run_id).data.params
            super(MLflowTracker, self).log_hyperparams(
                {k: v for k, v in (params or {}).items() if k not in have}
            )

        self._try(send)

    @rank_zero_only
    def log_files(self, *paths: Path) -> None:
        """Attach files to the run."""
        for path in paths:
            self._try(lambda path=path: self.experiment.log_artifact(self.run_id, str(path)))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        self._try(lambda: super(MLflowTracker, self).finalize(status))

    def _try(self, action) -> None:
        if self._broken:
            return
        try:
            action()
        except Exception as error:  # whatever a store raises must not end a training run
            self._broken = True
            logging.warning(
                f"MLflow is not reachable, its figures are dropped from here on ({METRICS_FILE} has them): {error}"
            )
