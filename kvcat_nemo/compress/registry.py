"""Compressors by name, as users write them: NAME, NAME:setting=value:…, and stacked with +.

attention-matching            attention-matching:selection=omp:queries=repeat
kvpress.SnapKVPress:window_size=32        attention-matching+int8
"""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

import yaml

from kvcat_nemo.compress.base import Compressor

# name → module:class; imported when used.
COMPRESSORS = {
    "random": "baselines:Random",
    "recent": "baselines:Recent",
}


def _class(name: str) -> type[Compressor]:
    module, _, attribute = COMPRESSORS[name].partition(":")
    return getattr(importlib.import_module(f"kvcat_nemo.compress.{module}"), attribute)


def make(specification: str) -> Compressor:
    """The compressor that a specification names.

    Raises:
        ValueError: on an unknown name or setting, or a value that does not fit.
    """
    name, *settings = specification.strip().split(":")
    if name not in COMPRESSORS:
        raise ValueError(f"compressor {name!r}: choose among {', '.join(COMPRESSORS)}")
    kind = _class(name)
    known = [field.name for field in fields(kind)]
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"compressor {specification!r}: {setting!r} is not a setting; {name} has"
                f" {', '.join(f'{x}=…' for x in known) or 'none'}"
            )
        values[key] = yaml.safe_load(value)
    return kind(**values)
