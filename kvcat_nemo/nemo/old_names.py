"""Python names under which older versions stored this room's classes, and where they stand now.

A checkpoint's context/ (NeMo's io.json, model.yaml and pickled callbacks) and NeMo-Run's experiments hold classes by module and
name. Resuming, export and reports read none of it; NeMo's own `io.load_context` and a NeMo-Run experiment that is started
again do. Importing an old module gives an empty one that looks each name up in its new place. A class that moves adds a
line here and in tests/nemo/stored_names.json.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings

ROOM = "kvcat_nemo.nemo"

MODULES = {
    "base": "base_model",
    "callbacks": "metrics",
    "config": "model_configs",
    "data": "data_module",
    "host": "cpu_support",
    "lifeline": "liveness",
    "model": "lightning_module",
    "random_state": "rng_callback",
    "settings": "trainer_settings",
    "tracking": "mlflow_logger",
    "verify": "checkpoint_check",
}
"""Old module → new one."""

CLASSES = {"stop": {"KVCatTrainer": "trainer"}, "strategy": {"KVCatOptimizerModule": "optimizer"}}
"""Module that is still there → class → where the class stands now."""

RENAMED = {"KVCatLifeline": "KVCatHeartbeat"}
"""Classes that have another name now; their modules keep the old one as an alias."""


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what no other finder has found: modules that are gone."""

    def find_spec(self, name, path=None, target=None):
        room, _, module = name.rpartition(".")
        return importlib.machinery.ModuleSpec(name, self) if room == ROOM and module in MODULES else None

    def exec_module(self, module: types.ModuleType) -> None:
        new = f"{ROOM}.{MODULES[module.__name__.rpartition('.')[2]]}"
        warnings.warn(f"{module.__name__} is {new} now", DeprecationWarning, stacklevel=2)
        module.__getattr__ = lambda name: getattr(importlib.import_module(new), name)  # type: ignore[method-assign]


def install() -> None:
    """Let old modules be imported; once per process."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def moved_class(module: str, name: str):
    """For a module's `__getattr__`: a class that has moved out of it.

    Raises:
        AttributeError: when the module never had it.
    """
    new = CLASSES.get(module.rpartition(".")[2], {}).get(name)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{ROOM}.{new}"), name)
