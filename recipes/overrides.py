"""Checks `key=value` overrides of a recipe before nemo-run does: an unknown name gets the nearest one suggested."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo.collections import llm

from kvcat_nemo.common.redact import refuse_credentials
from kvcat_nemo.launch.overrides import key_of
from kvcat_nemo.launch.values import check_value, forms


def recipe(name: str) -> Callable:
    """Register a function as the recipe `name` of `nemo llm pretrain`; its command-line overrides are checked."""

    def register(function: Callable) -> Callable:
        @run.cli.factory(target=llm.pretrain, name=name)
        @functools.wraps(function)
        def build(*args, **kwargs):
            asked = _asked_for(name)
            if asked:
                refuse_credentials(sys.argv[1:])
                check_executor(sys.argv[1:])
            out = function(*args, **kwargs)
            if asked:
                check_overrides(out, sys.argv[1:])
            return out

        return build

    return register


def _asked_for(name: str) -> bool:
    """Whether this process is `nemo … --factory name`; recipes that derive from it must not see its overrides."""
    if os.path.basename(sys.argv[0]) not in ("nemo", "nemorun"):
        return False
    factories = [
        after for flag, after in zip(sys.argv, sys.argv[1:], strict=False) if flag in ("--factory", "-f")
    ]
    factories += [a.removeprefix("--factory=") for a in sys.argv if a.startswith("--factory=")]
    return any(f.split("(")[0].strip() == name for f in factories)


def check_overrides(recipe: run.Partial, arguments: Iterable[str]) -> None:
    """Refuse overrides that name nothing in the recipe.

    Args:
        arguments: the command line; only `dotted.name=value` (and `+=`, `*=` …) is looked at.

    Raises:
        ValueError: naming the unknown part and the nearest known name.
    """
    for argument in arguments:
        key = key_of(argument)
        if key and key.split(".")[0] not in ("run", "executor", "plugins"):
            _check(recipe, key)


def check_executor(arguments: Iterable[str]) -> None:
    """Refuse settings of a NeMo-Run executor that could not stand in a batch script: NeMo-Run writes them there as they are.

    Raises:
        ValueError: as kvcat_nemo.launch.values.check_value.
    """
    for argument in arguments:
        key = key_of(argument) or ""
        option = key.removeprefix("run.executor.").replace("_", "-")
        option = {"container-image": "image", "job-name-prefix": "job-name"}.get(option, option)
        value = argument.partition("=")[2].strip().strip("'\"")
        if key.startswith("run.executor.") and option in forms() and value != "None":
            check_value(option, value, shown=key)


def _check(config: fdl.Buildable, dotted: str) -> None:
    done: list[str] = []
    for part in dotted.split("."):
        if not isinstance(config, fdl.Buildable):
            return  # inside a plain value, which nemo-run knows how to handle
        target = fdl.get_callable(config)
        known = list(settable(target) | fdl.ordered_arguments(config))  # NeMo sets some that **kwargs hide
        part, *places = re.findall(r"\d+(?=\])|[^\[\]]+(?=\[|$)", part) or [part]
        if known and part not in known:
            near = difflib.get_close_matches(part, known, n=3, cutoff=0.5)
            full = [".".join([*done, name]) for name in near]
            hint = f"did you mean {' or '.join(full)}?" if near else f"known here: {', '.join(sorted(known))}"
            raise ValueError(f"{dotted}: {target.__name__} has no field {part!r}; {hint}")
        done.append(part)
        config = getattr(config, part, None)
        for place in map(int, places):
            config = config[place] if isinstance(config, list | tuple) and place < len(config) else None


def settable(target: Callable) -> dict[str, Any]:
    """Parameters of a callable and their defaults, those hidden behind **kwargs of its base classes included."""
    out: dict[str, Any] = {}
    for owner in inspect.getmro(target) if inspect.isclass(target) else [target]:
        function = owner.__dict__.get("__init__") if inspect.isclass(owner) else owner
        if function is None or owner is object:
            continue
        parameters = inspect.signature(function).parameters.values()
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self":
                out.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return out
