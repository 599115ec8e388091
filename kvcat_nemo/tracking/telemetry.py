"""Libraries under a training run report its use to their makers unless told not to; here they are told."""

from __future__ import annotations

import os

ASK = "KVCAT_TELEMETRY"

SWITCHES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # read when mlflow is imported
    "DO_NOT_TRACK": "true",  # what MLflow and others agree on
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, transformers, datasets
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_ERROR_REPORTING": "false",
    # NeMo's OneLogger sends nothing without an exporter, which this variable or a file in the working folder names:
    # whoever sets one has asked for it. Lightning sends nothing.
}


def switch_off() -> None:
    """Set every switch that the user has not set; with KVCAT_TELEMETRY=1 none. Call before the libraries are imported."""
    if os.environ.get(ASK) == "1":
        return
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
