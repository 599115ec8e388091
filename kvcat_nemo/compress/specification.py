"""Compressors by name, as users write them: NAME, NAME:setting=value:…, and stacked with +.

attention-matching            attention-matching:selection=omp:queries=repeat
kvpress.SnapKVPress:window_size=32        attention-matching+int8
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import yaml

from kvcat_nemo.common.limits import check_upper
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.kvpress_adapter import PRESSES, named_press
from kvcat_nemo.compress.stack import Stack

COMPRESSORS: dict[str, type[Compressor]] = {}
"""Compressors by name; registry.py fills it, so that a compressor may start from any other."""


def make(specification: str) -> Compressor:
    """The compressor that a specification names.

    Raises:
        ValueError: on an unknown name or setting, or a value that does not fit.
    """
    parts = re.split(r"\+(?=[A-Za-z])", specification.strip())  # not the + of 1e+5
    if len(parts) > 2:
        raise ValueError(f"compressor {specification!r}: stack one quantisation on one selection, A+B")
    if len(parts) == 2:
        return Stack(make(parts[0]), make(parts[1]))
    name, *settings = parts[0].split(":")
    if name in PRESSES or name.startswith("kvpress."):
        pairs = (setting.partition("=") for setting in settings)
        return named_press(name, {key: _value(value) for key, _, value in pairs})
    if name not in COMPRESSORS:
        raise ValueError(
            f"compressor {name!r}: choose among {', '.join([*COMPRESSORS, *PRESSES])}, or kvpress.CLASS"
        )
    kind = COMPRESSORS[name]
    known = [field.name for field in fields(kind)]
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"compressor {specification!r}: {setting!r} is not a setting; {name} has"
                f" {', '.join(f'{x}=…' for x in known) or 'none'}"
            )
        what = f"compressor {specification!r}: {key}"
        values[key] = _fitting(f"{what}={value}", getattr(kind, key), _value(value))
        check_upper(key, values[key], what)
    return kind(**values)


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text) if not re.fullmatch(r"[+-]?[\d.]+[eE][+-]?\d+", text) else float(text)
    except (yaml.YAMLError, ValueError):
        return text


def _fitting(what: str, default: Any, value: Any) -> Any:
    """The value in the type of the setting's default; YAML reads 1 as a whole number and 1e-4 as a word."""
    kind = type(default)
    if default is None:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
        raise ValueError(f"{what}: give {names.get(kind, kind.__name__)}, as in {default!r}")
    return value
