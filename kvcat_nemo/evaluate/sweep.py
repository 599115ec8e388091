"""Many evaluations from one YAML file, checked as a whole before the first one starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from kvcat_nemo.evaluate.protocol import Protocol
from kvcat_nemo.evaluate.registry import protocol_class

_TOP = ("out", "shared", "runs")


def load_sweep(path: str | Path, only: Iterable[str] | None = None) -> dict[str, Protocol]:
    """The runs of a sweep by name, their settings of the right names and types (`check` of each does the rest).

    Args:
        path: YAML with `out` (folder), `runs` (a list, each with `protocol`, maybe `name`, and settings) and maybe
            `shared` (settings of every run that has them; a run's own come first).
        only: names of the runs wanted; None: all.

    Raises:
        ValueError: names the file, the run and what is wrong with it.
    """
    path = Path(path)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; `kvcat evaluate sweep --help` shows what to write") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not YAML ({error})") from error
    try:
        runs = _runs(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    wanted = list(only) if only is not None else list(runs)
    for name in wanted:
        if name not in runs:
            raise ValueError(f"{path}: no run is called {name!r}; there are {', '.join(runs)}")
    return {name: run for name, run in runs.items() if name in wanted}


def _runs(config: Any) -> dict[str, Protocol]:
    if not isinstance(config, dict):
        raise ValueError("must hold `out` and `runs`; `kvcat evaluate sweep --help` shows an example")
    for key in config:
        if key not in _TOP:
            raise ValueError(
                f"{key!r} is not known at the top; {', '.join(_TOP)} are. Settings of all runs go to shared"
            )
    out, shared, entries = config.get("out"), config.get("shared") or {}, config.get("runs")
    if not isinstance(out, str) or not out:
        raise ValueError("out is missing; give the folder of the results")
    if not isinstance(shared, dict):
        raise ValueError(f"shared must hold settings (name: value), is {type(shared).__name__}")
    if not isinstance(entries, list) or not entries:
        raise ValueError("runs must be a list with at least one run")
    runs: dict[str, Protocol] = {}
    used: set[str] = set()
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or "protocol" not in entry:
            raise ValueError(f"run {number}: must hold `protocol` and its settings")
        own = {k: v for k, v in entry.items() if k not in ("protocol", "name")}
        name = str(entry.get("name", entry["protocol"]))
        if name in runs or Path(name).name != name or name in (".", ".."):
            raise ValueError(
                f"run {number}: name {name!r} is taken or no folder's name; give each run its own"
            )
        try:
            kind = protocol_class(entry["protocol"])
            if "out" in own:
                raise ValueError(f"'out' is the sweep's; results go to {out}/{name}")
            known = {f.name for f in dataclasses.fields(kind)}
            used |= shared.keys() & known
            fitting = {k: v for k, v in shared.items() if k in known}
            runs[name] = kind.of({**fitting, **own, "out": str(Path(out) / name)})
        except ValueError as error:
            raise ValueError(f"run {name!r}: {error}") from error
    if unknown := [k for k in shared if k not in used]:
        raise ValueError(f"shared: {unknown[0]!r} is a setting of none of the runs")
    return runs
