"""Every setting of Megatron's and NeMo's configurations: tested with the paired pass, refused, or none of its business.

A setting that nobody looked at is how a run starts and ends wrong. So each field stands in exactly one of the tables of
refused_settings.py and accepted_settings.py, and a field that a newer Megatron brings is refused unless it has its default.
docs/settings.md shows the tables; a test holds them to the classes' fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvcat_nemo.engine.accepted_settings import CONDITIONAL, PARTS_OF_REFUSED, PASSES
from kvcat_nemo.engine.refused_settings import MODEL, Refused


def verdict_on(name: str) -> tuple[str, str] | None:
    """("tested", …), ("refused", …) or ("passes", …) and the reason; None when no table knows the field."""
    if name in MODEL:
        return "refused", MODEL[name].why
    if name in CONDITIONAL:
        return "tested", CONDITIONAL[name]
    if name in PASSES:
        return "passes", PASSES[name]
    if name.startswith(PARTS_OF_REFUSED):
        return "passes", f"of {name.partition('_')[0]} layers, which are refused"
    return None


def check_model_settings(config) -> None:
    """Refuse values that the tables refuse, and fields unknown to them that do not have their default.

    Raises:
        ValueError: naming the field, the value, why, and what to do.
    """
    check(config, MODEL, "model.config")
    for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        if verdict_on(field.name) is not None:
            continue
        value, usual = getattr(config, field.name), _default(field)
        if value != usual:
            raise ValueError(
                f"model.config.{field.name}={value!r}: this version of Megatron-core or NeMo knows it, kvcat-nemo has no test of "
                f"it; leave it at {usual!r}"
            )


def check(settings: Any, table: Mapping[str, Refused], where: str) -> None:
    """Refuse what a table refuses, on an object (or a configuration of one that is still to be built)."""
    for name, rule in table.items():
        value = getattr(settings, name, None)
        if value is None or any(value is but or value == but for but in rule.but):
            continue
        if value == [] or value == ():
            continue
        raise ValueError(f"{where}.{name}={value!r}: {rule.why}")


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None
