"""Protocols by name. A new one is its settings (settings.py), a module that measures, and a line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvcat_nemo.evaluate import settings
from kvcat_nemo.evaluate.options import suggest

if TYPE_CHECKING:
    from kvcat_nemo.evaluate.protocol import Protocol

# name → its settings, and module:class in kvcat_nemo.evaluate, imported when used: the command line's help needs no torch.
PROTOCOLS: dict[str, tuple[type[settings.ProtocolSettings], str]] = {
    "continuation": (settings.ContinuationSettings, "continuation:Continuation"),
    "gradient": (settings.GradientSettings, "gradient_curve:GradientCurve"),
    "needle": (settings.NeedleSettings, "needle:Needle"),
    "long-qa": (settings.LongQASettings, "long_qa:LongQA"),
    "ruler": (settings.RulerSettings, "ruler:Ruler"),
    "base-ability": (settings.BaseAbilitySettings, "base_ability:BaseAbility"),
}


def protocol_class(name: str) -> type[Protocol]:
    """The class of a protocol.

    Raises:
        ValueError: when there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r}: no such protocol; {suggest(str(name), PROTOCOLS)}")
    module, _, attribute = PROTOCOLS[name][1].partition(":")
    return getattr(importlib.import_module(f"kvcat_nemo.evaluate.{module}"), attribute)
