"""Writes a run's configuration, manifest and pictures beside its checkpoints, and hands them to its loggers."""

import dataclasses
import inspect
import json
from enum import Enum
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from nemo.utils import logging

from kvcat_nemo.common.redact import redact_tree
from kvcat_nemo.engine.cost import flops_per_step
from kvcat_nemo.method.config import keep_target
from kvcat_nemo.nemo.mlflow_logger import MetricsFile, MLflowTracker, run_folder, write_atomically
from kvcat_nemo.runs.layout import (
    BASE,
    CONFIG_FILE,
    CONFIG_YAML,
    LOSSES_PICTURE,
    METRICS_FILE,
    ORDER_FILE,
    PROVENANCE_FILE,
)
from kvcat_nemo.runs.pictures import plot_run
from kvcat_nemo.runs.provenance import manifest
from kvcat_nemo.tracking.afterwards import flatten


class KVCatRecords(pl.Callback):
    """Writes kvcat/config.yaml (and .json), kvcat/data_order.json, kvcat/manifest.json and kvcat/losses.png, and attaches them to the MLflow run."""

    def __init__(self):
        self._based = False

    def on_train_start(self, trainer, pl_module) -> None:
        if not trainer.is_global_zero:
            return
        described = redact_tree(describe(trainer, pl_module))
        # Through JSON: NumPy's scalars and other types become plain values, which safe YAML takes.
        described = json.loads(json.dumps(described, default=str))
        folder = run_folder()
        write_atomically(folder / CONFIG_FILE, json.dumps(described, indent=2) + "\n")
        write_atomically(folder / CONFIG_YAML, yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
        if hasattr(trainer.datamodule, "order_record"):
            order = json.dumps(trainer.datamodule.order_record(), indent=1)
            write_atomically(folder / ORDER_FILE, order + "\n")
        facts = redact_tree(manifest(config=described, world_size=trainer.world_size))
        write_atomically(folder / PROVENANCE_FILE, json.dumps(facts, indent=2) + "\n")
        for logger in trainer.loggers:
            logger.log_hyperparams(flatten(described))
            if isinstance(logger, MLflowTracker):
                logger.log_files(folder / CONFIG_YAML, folder / CONFIG_FILE, folder / PROVENANCE_FILE)

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        # Not at the start: there NeMo has yet to move away the loose files that the run's former process left.
        if self._based or not trainer.is_global_zero:
            return
        self._based = True
        base = getattr(trainer.datamodule, "base", None)
        if base:
            write_atomically(run_folder().parent / BASE, json.dumps({"base": str(base)}) + "\n")

    def on_fit_end(self, trainer, pl_module) -> None:
        if not trainer.is_global_zero:
            return
        folder, kvcat = run_folder(), pl_module.config.kvcat
        files = [folder / METRICS_FILE]
        try:
            title = f"{folder.parent.name}: step {trainer.global_step:,} of {trainer.max_steps:,}"
            picture = folder / LOSSES_PICTURE
            plot_run(MetricsFile.lines(files[0]), picture, title=title, target_keep=keep_target(vars(kvcat)))
            files.append(picture)
        except Exception as error:  # a picture must not end a training run
            logging.warning(f"kvcat: no picture of the run: {error}")
        for logger in trainer.loggers:
            if isinstance(logger, MLflowTracker):
                logger.log_files(*files)
                logger.complete = trainer.global_step >= trainer.max_steps


def tflops_per_gpu(trainer: pl.Trainer, pl_module, seconds: float) -> dict[str, float]:
    """TFLOP/s that each process did in a step of so many seconds, both passes counted (engine.cost.flops_per_step).

    Empty where the model's or the batch's size is not known.
    """
    config, data = pl_module.config, trainer.datamodule
    if not config.vocab_size or not hasattr(data, "global_batch_size"):
        return {}
    # Of a layout it reads the batch, which the data module has under the same names.
    flops = flops_per_step(config, data)
    return {"tflops_per_gpu": flops / seconds / trainer.world_size / 1e12}


def describe(trainer: pl.Trainer, pl_module) -> dict[str, Any]:
    """The resolved recipe as plain values: everything it was given, overrides and defaults included."""
    data, scheduler = trainer.datamodule, pl_module.optim.lr_scheduler
    checkpoint, restore = trainer.checkpoint_callback, getattr(trainer.strategy, "restore_config", None)
    others = [c for c in trainer.callbacks if c is not checkpoint]
    return {
        "model": _plain(pl_module.config),
        "optimizer": _plain(pl_module.optim.config),
        "schedule": _simple(scheduler) if scheduler else {},
        "data": {"base": None} | _arguments(data),
        "trainer": {
            "max_steps": trainer.max_steps,
            "world_size": trainer.world_size,
            "num_nodes": trainer.num_nodes,
            "devices": trainer.num_devices,
            "val_check_interval": trainer.val_check_interval,
            "limit_val_batches": trainer.limit_val_batches,
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
        },
        "strategy": _simple(trainer.strategy)
        | {"ddp": _plain(getattr(trainer.strategy, "ddp_config", None))},
        "checkpoints": _arguments(checkpoint) if checkpoint is not None else {},
        "callbacks": {type(c).__name__: _arguments(c) for c in others},
        "resume": {"path": _plain(trainer.ckpt_path), "base": _plain(getattr(restore, "path", None))},
    }


_SETTING = int | float | str | list | tuple | dict | None


def _arguments(owner: Any) -> dict[str, Any]:
    """What an object was made with, as far as it keeps it under the argument's name: values that are settings, not machinery."""
    out: dict[str, Any] = {}
    for kind in type(owner).__mro__[:-1]:
        made = kind.__dict__.get("__init__")
        if not inspect.isfunction(made):
            continue
        parameters = inspect.signature(made).parameters
        for name in parameters:
            value = getattr(owner, name, getattr(owner, f"_{name}", owner))
            plain = dataclasses.is_dataclass(value) or isinstance(value, _SETTING | Path)
            if name not in ("self", "args", "kwargs") and name not in out and plain:
                out[name] = _plain(value)
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # what it hands to its base is not for others to set
    return out


def _simple(owner: Any) -> dict[str, Any]:
    """Public attributes that are settings, not machinery."""
    return {
        k: v
        for k, v in vars(owner).items()
        if isinstance(v, int | float | str | None) and not k.startswith("_")
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not callable(getattr(value, f.name, None))
        }
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Enum):
        return value.name
    return value if isinstance(value, int | float | str | bool | None) else str(value)
