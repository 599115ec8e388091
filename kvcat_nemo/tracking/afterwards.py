"""A run's figures, files and model to MLflow after the training: `kvcat train track`, `kvcat export --register`."""

from __future__ import annotations

import os
from pathlib import Path

from kvcat_nemo.common.redact import redact, refuse_credentials
from kvcat_nemo.runs.layout import (
    CONFIG_FILE,
    CONFIG_YAML,
    LOSSES_PICTURE,
    METRICS_FILE,
    PROVENANCE_FILE,
    RUN_FILE,
    RunFolder,
    max_steps_of,
    read_record,
)
from kvcat_nemo.tracking.mlflow_run import MlflowRun, client_of, store_uri

FILES = (CONFIG_YAML, CONFIG_FILE, PROVENANCE_FILE, METRICS_FILE, LOSSES_PICTURE)
"""What of a run's records is attached to its MLflow run."""


def bring(folder: Path, *, experiment: str = "kvcat", uri: str | None = None) -> tuple[str, str]:
    """Complete a run in an MLflow store from its folder; what is there already is not sent again.

    Args:
        folder: the run's folder, with `kvcat/` in it. Its job must not be running: it sends its figures itself.

    Returns:
        the run's id, and the store's address without credentials.

    Raises:
        ValueError: when the folder holds no run, the address holds credentials, or the store does not answer.
    """
    kept = RunFolder(folder)
    if not kept.metrics.is_file():
        raise ValueError(f"{kept.metrics} does not exist: {folder} is no training run's folder")
    if uri is not None:
        refuse_credentials([uri])
    where = store_uri(uri)
    described = read_record(kept.config)
    read_record(kept.mlflow_run)  # a damaged one is no fault of the store
    run = MlflowRun(kept.records, uri=where, experiment=experiment, name=folder.name)
    try:
        run.connect()
        run.log_params(flatten(described))
        run.log_files([kept.records / name for name in FILES])
        ended = (at := kept.finished_at()) is not None and at == max_steps_of(described)
        run.end("FINISHED" if ended else "KILLED")
    except Exception as error:  # of MLflow, requests or a database
        raise ValueError(f"MLflow at {redact(where)}: {redact(str(error))}") from None
    return run.run_id, where


def flatten(tree: dict, prefix: str = "") -> dict:
    """Nested dict → one level, keys joined by dots."""
    out: dict = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        out |= flatten(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return out


def training_folder(path: Path) -> Path:
    """The `kvcat/` folder that belongs to a run, or to one of its checkpoints.

    Raises:
        ValueError: when there is none.
    """
    for folder in [path.absolute(), *path.absolute().parents][:4]:
        if RunFolder(folder).mlflow_run.is_file():
            return RunFolder(folder).records
    raise ValueError(
        f"{path} belongs to no run with {RUN_FILE}; train with the MLflow logger, or kvcat train track first"
    )


def register_model(model: Path, name: str, *, run: Path, uri: str | None = None) -> str:
    """Log an exported Hugging Face folder to its training's MLflow run and register it under `name`.

    Returns:
        the version that was made.

    Raises:
        ValueError: when the run is not known to MLflow, or the store does not answer.
    """
    kept = training_folder(run)
    run_id = read_record(kept / RUN_FILE).get("run_id")
    where = store_uri(uri)
    os.environ.setdefault(
        "MLFLOW_HTTP_REQUEST_TIMEOUT", "600"
    )  # weights are large, and nothing waits for them
    try:
        status = client_of(where).get_run(run_id).info.status
        import mlflow

        mlflow.set_tracking_uri(where)
        with mlflow.start_run(run_id=run_id, log_system_metrics=False):
            info = mlflow.transformers.log_model(
                str(model.resolve()),  # a relative folder looks like the name of one on a hub
                name="model",
                task="text-generation",
                registered_model_name=name,
                pip_requirements=["torch", "transformers"],
            )
        client_of(where).set_terminated(run_id, status if status != "RUNNING" else "FINISHED")
    except Exception as error:
        raise ValueError(f"MLflow at {redact(where)}: {redact(str(error))}") from None
    return str(info.registered_model_version)
