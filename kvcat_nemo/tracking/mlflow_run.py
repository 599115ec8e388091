"""The one MLflow run of a training: found again after a requeue, each step of a metric in it once."""

from __future__ import annotations

import json
import math
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcat_nemo.common.files import new_file
from kvcat_nemo.common.redact import redact, redact_tree, split_credentials
from kvcat_nemo.runs.layout import METRICS_FILE, RUN_FILE, read_record
from kvcat_nemo.runs.metrics_file import MetricsFile, write_atomically
from kvcat_nemo.tracking.outbox import BATCH, Figure, Refused
from kvcat_nemo.tracking.telemetry import switch_off

TRAINING_TAG = "kvcat.training"
CHANGED_TAG = "kvcat.changed"

_REQUEST = {  # short: an outbox has its own patience. What the user has set stays.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
_PARAMS = 100  # MLflow takes no more in one request
_PARAM_LENGTH = 6000


def store_uri(tracking_uri: str | None = None) -> str:
    """Where runs go: the given address, MLFLOW_TRACKING_URI, or the file mlflow.db in the working folder.

    Credentials in an http(s) address move to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of this process, where
    MLflow reads them, so that no message, file or child's command line can repeat them.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"
    clean, user, password = split_credentials(uri)
    if user:
        os.environ["MLFLOW_TRACKING_USERNAME"] = user
    if password:
        os.environ["MLFLOW_TRACKING_PASSWORD"] = password
    if clean != uri and os.environ.get("MLFLOW_TRACKING_URI") == uri:
        os.environ["MLFLOW_TRACKING_URI"] = clean
    return clean


def client_of(uri: str):
    """An MLflow client that gives up soon and reports its use to nobody. A SQLite file that is not there is made."""
    switch_off()
    for name, value in _REQUEST.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    path = uri.removeprefix("sqlite:///")
    if path != uri and path and not set(path) & set("?:") and not os.path.exists(path):
        # A process that is killed while MLflow makes its tables would leave a database that MLflow never opens again.
        with new_file(path, replace=False) as temporary:
            MlflowClient(tracking_uri=f"sqlite:///{temporary.resolve()}").search_experiments(max_results=1)
    return MlflowClient(tracking_uri=uri)


def figures_of(line: Mapping[str, Any]) -> list[Figure]:
    """The figures of a metrics file's line."""
    milliseconds = int(line.get("time", 0) * 1000)
    return [
        Figure(f"{line['kind']}/{name}", float(value), line["step"], milliseconds)
        for name, value in line.items()
        if name not in ("kind", "step", "time") and isinstance(value, int | float) and math.isfinite(value)
    ]


class MlflowRun:
    """A training's run in an MLflow store; what an outbox sends to.

    Args:
        folder: the run's own folder; RUN_FILE in it says which run is continued, METRICS_FILE is the record.
        uri: of the store, without credentials (`store_uri`); experiment: created when missing; name: of a new run.

    The run is known by a tag that is written to disk before the run is created, so a lost answer of the store makes no
    second run. In another store than before, the training starts a run there and brings its record along.
    """

    def __init__(self, folder: Path, *, uri: str, experiment: str, name: str):
        self.folder, self.uri, self.experiment, self.name = folder, uri, experiment, name
        self.run_id: str | None = None
        self._client = None
        self._last: dict[str, int] = {}  # the last step of each metric in the store
        self._params: dict[str, str] = {}

    # --- Sink ---

    def connect(self) -> None:
        client = client_of(self.uri)
        record = self._record()
        run = self._find(client, record) or self._create(client, record)
        self.run_id = run.info.run_id
        # One request for all, as MLflow's own system metrics do; the history of a long run would be millions of values.
        self._last = {metric.key: metric.step for metric in run.data._metric_objs}
        self._params = dict(run.data.params)
        if run.info.status != "RUNNING":
            client.update_run(self.run_id, status="RUNNING")
        self._client = client
        if record.get("run_id") != self.run_id:
            known = record | {"run_id": self.run_id, "experiment": self.experiment, "store": redact(self.uri)}
            write_atomically(self.folder / RUN_FILE, json.dumps(known) + "\n")
        self.catch_up()  # what a killed process, or another store's time, left unsent

    def send(self, figures: Sequence[Figure]) -> None:
        from mlflow.entities import Metric

        last, metrics = dict(self._last), []
        with _refusals():
            for figure in figures:
                step = last.get(figure.name, -1) + 1 if figure.step is None else figure.step
                if step > last.get(figure.name, -1):
                    metrics.append(Metric(figure.name, figure.value, figure.milliseconds, step))
                    last[figure.name] = step
            if metrics:
                self._client.log_batch(self.run_id, metrics=metrics)
        self._last = last

    def catch_up(self) -> None:
        batch: list[Figure] = []
        for line in MetricsFile.read(self.folder / METRICS_FILE):
            new = [f for f in figures_of(line) if f.step > self._last.get(f.name, -1)]
            if len(batch) + len(new) > BATCH:
                self.send(batch)
                batch = []
            batch += new
        if batch:
            self.send(batch)

    # --- what else belongs to a run ---

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters, one level deep. What the run has already stays (MLflow refuses changes); a tag says what differs now."""
        from mlflow.entities import Param

        clean = redact_tree({_NOT_IN_NAMES.sub("_", k)[:250]: v for k, v in params.items()})
        texts = {name: str(value)[:_PARAM_LENGTH] for name, value in clean.items()}
        new = [Param(name, value) for name, value in texts.items() if name not in self._params]
        with _refusals():
            for start in range(0, len(new), _PARAMS):
                self._client.log_batch(self.run_id, params=new[start : start + _PARAMS])
        changed = {
            n: [self._params[n], t] for n, t in texts.items() if n in self._params and self._params[n] != t
        }
        if changed:
            self._client.set_tag(self.run_id, CHANGED_TAG, json.dumps(changed)[:5000])
        self._params |= {p.key: p.value for p in new}

    def log_files(self, paths: Sequence[Path], folder: str | None = None) -> None:
        """Attach files; one that is not there is passed over."""
        for path in paths:
            if path.exists():
                with _refusals():
                    self._client.log_artifact(self.run_id, str(path), folder)

    def end(self, status: str) -> None:
        """Close the run: FINISHED, FAILED, or KILLED for one that stopped early and may go on."""
        self._client.set_terminated(self.run_id, status)

    # --- finding and making it ---

    def _record(self) -> dict[str, Any]:
        path = self.folder / RUN_FILE
        record = read_record(path)
        if "training" not in record:
            record["training"] = uuid.uuid4().hex
            write_atomically(path, json.dumps(record) + "\n")
        return record

    def _find(self, client, record: Mapping[str, Any]):
        from mlflow.exceptions import MlflowException

        if "run_id" in record:
            try:
                return client.get_run(record["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            return None
        runs = client.search_runs(
            [found.experiment_id], f"tags.`{TRAINING_TAG}` = '{record['training']}'", max_results=1
        )
        return client.get_run(runs[0].info.run_id) if runs else None

    def _create(self, client, record: Mapping[str, Any]):
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                identity = client.create_experiment(self.experiment, artifact_location=self._artifacts())
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was faster
                    raise
                identity = client.get_experiment_by_name(self.experiment).experiment_id
        else:
            identity = found.experiment_id
        tags = {TRAINING_TAG: record["training"], "mlflow.source.name": "kvcat-nemo"}
        first = next(MetricsFile.read(self.folder / METRICS_FILE), {})
        started = int(first.get("time", time.time()) * 1000)
        return client.create_run(identity, tags=tags, run_name=self.name, start_time=started)

    def _artifacts(self) -> str | None:
        """Beside the database file, wherever a process happens to be started; a server decides for itself."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).resolve().parent / "mlruns").as_uri()


class _refusals:
    """Tells a final no, of the store or of its client, from trouble on the way: the former is raised as Refused."""

    _FINAL = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "REQUEST_LIMIT_EXCEEDED"}
    # Of values that do not even become a request; all trouble with those is wrapped by MLflow.
    _WRONG = (TypeError, ValueError, AttributeError)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, self._WRONG) or getattr(error, "error_code", None) in self._FINAL:
            raise Refused(f"{kind.__name__}: {error}") from error
