"""Checks of single values in config.json. Every refusal has one form: field = value: why; what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn


def refuse(where: str, field: str, value: Any, why: str, fix: str) -> NoReturn:
    raise ValueError(f"{where}: {field} = {value!r}: {why}; {fix}")


def number(where: str, field: str, value: Any, *, above: float) -> float:
    """A finite number above `above`.

    Raises:
        ValueError: for anything else, a text that holds a number and true included.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        refuse(where, field, value, f"it must be a finite number above {above:g}", "mend it")
    return float(value)


def whole(where: str, field: str, value: Any, *, at_most: int = 2**31 - 1) -> int:
    """A whole number from 1 to `at_most`.

    Raises:
        ValueError: for anything else, 4.0, "4" and true included.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
        shown = value if not isinstance(value, int) or value.bit_length() < 128 else "a huge number"
        refuse(where, field, shown, f"it must be a whole number from 1 to {at_most:,}", "mend it")
    return value


def flag(where: str, field: str, value: Any, default: bool = False) -> bool:
    """true or false; None means the default.

    Raises:
        ValueError: for anything else: the text "false" counts as true elsewhere.
    """
    if value is None:
        return default
    if not isinstance(value, bool):
        refuse(where, field, value, "it must be true or false", "mend it")
    return value


def agreed(where: str, given: Mapping[str, Any], difference: str) -> Any:
    """The one value of several fields; None when none has one.

    Raises:
        ValueError: when two fields have different values.
    """
    said = {field: value for field, value in given.items() if value is not None}
    for field, value in said.items():
        first, other = next(iter(said.items()))
        if value != other or isinstance(value, bool) != isinstance(other, bool):
            refuse(
                where,
                first,
                other,
                f"it stands beside {field} = {value!r}, and readers differ ({difference})",
                "keep the one that the model was trained with",
            )
    return next(iter(said.values()), None)
