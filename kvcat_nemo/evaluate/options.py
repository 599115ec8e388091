"""How a setting is declared: once, with its help, unit and range. The command line, sweeps and checks all follow from it.

A protocol's settings are a dataclass whose fields `option` makes (settings.py). This module needs neither torch nor
click, so that help is shown at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from kvcat_nemo.common.limits import check_upper


@dataclass(frozen=True)
class Option:
    """What a setting means, and which values it takes."""

    help: str
    """A sentence for the command line, with the unit."""
    choices: tuple[str, ...] = ()
    """The words that it takes; of a list, the words that each entry may be."""
    least: float | None = None
    """The smallest value; of a list of numbers, the smallest entry."""
    most: float | None = None
    """The largest value, or entry."""
    above: float | None = None
    """The value must be larger than this."""
    hint: str = ""
    """What to give instead, after the range in messages."""
    number: Callable[[str], float] | None = None
    """int or float: the list's words are numbers, each given once."""
    each: str = ""
    """A word for the list's entries, of which each is given once, and at least one."""
    unset: str = ""
    """What holds when nothing is given, in words, where the default does not say it by itself."""
    repeated: bool = False
    """On the command line the option is given once for each entry, instead of commas."""
    file: bool = False
    """The value is a file's path."""
    metavar: str | None = None
    on_command_line: bool = True


def option(default: Any = dataclasses.MISSING, help: str = "", **about: Any) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: the value when nothing is given; lists are copied. Without it, the setting must be given.
        help, about: the fields of Option.
    """
    metadata = {"option": Option(help, **about)}
    if isinstance(default, list | tuple):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def options_of(settings: type) -> dict[str, tuple[dataclasses.Field, Any, Option]]:
    """A settings class' fields by name, each with its type and its Option."""
    hints = typing.get_type_hints(settings)
    return {f.name: (f, hints[f.name], f.metadata["option"]) for f in dataclasses.fields(settings)}


def default_of(field: dataclasses.Field) -> Any:
    """The value when nothing is given; dataclasses.MISSING where it must be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


class Settings:
    """Base of settings dataclasses: made from what a command line or a YAML file holds, checked field by field."""

    name: ClassVar[str]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The settings of the given values, as a YAML file or the command line holds them.

        Raises:
            ValueError: on an unknown setting, a missing one, one of the wrong type, or a number that no run could work off.
        """
        known = options_of(cls)
        for key in settings:
            if key not in known:
                raise ValueError(f"{key!r} is not a setting of {cls.name}; {suggest(str(key), known)}")
        for name, (field, _, _) in known.items():
            if default_of(field) is dataclasses.MISSING and name not in settings:
                raise ValueError(f"{cls.name}: {name} is missing; give it")
        fitting = {key: fit(key, value, known[key][1]) for key, value in settings.items()}
        for key, value in fitting.items():
            check_upper(key, value)
        return cls(**fitting)

    def check_options(self) -> None:
        """Check every setting against its own range and choices.

        Raises:
            ValueError: names the setting, its value, and what to give.
        """
        for name, (_, _, about) in options_of(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                _check_list(name, value, about)
            elif value is not None:
                _check_one(name, value, about)


def _check_one(name: str, value: Any, about: Option) -> None:
    more = f"; {about.hint}" if about.hint else ""
    if about.choices and value not in about.choices:
        raise ValueError(f"{name}={value!r}: choose among {', '.join(about.choices)}{more}")
    if about.above is not None and not value > about.above:
        raise ValueError(f"{name}={value}: give a number above {about.above:g}{more}")
    if about.least is not None and not value >= about.least:
        raise ValueError(f"{name}={value}: give at least {about.least:g}{more}")
    if about.most is not None and not value <= about.most:
        raise ValueError(f"{name}={value}: give at most {about.most:g}{more}")


def _check_list(name: str, values: list[str], about: Option) -> None:
    for value in values:
        if about.choices and value not in about.choices:
            raise ValueError(f"{name}: {value!r} is not known; choose among {', '.join(about.choices)}")
    if about.each and (not values or len(set(values)) < len(values)):
        raise ValueError(f"{name}={','.join(values)!r}: give each {about.each} once, and at least one")
    if about.number is not None:
        numbers(values, name, about)


def numbers(words: list[str], name: str, about: Option) -> list:
    """A setting's words as different numbers.

    Raises:
        ValueError: not numbers, out of the option's range, none, or one twice.
    """
    text = ",".join(words)
    try:
        values = [about.number(word) for word in words]
    except ValueError:
        raise ValueError(f"{name}={text!r}: must be numbers, comma-separated") from None
    least = -math.inf if about.least is None else about.least
    good = all(math.isfinite(value) and value >= least for value in values)
    if not values or not good or len(set(values)) < len(values):
        raise ValueError(f"{name}={text!r}: give different numbers, each at least {least:g}")
    if about.most is not None and not max(values) <= about.most:
        raise ValueError(f"{name}={text}: each must be from {about.least:g} to {about.most:g}; {about.hint}")
    return values


def suggest(word: str, known: Iterable[str]) -> str:
    """A hint after an unknown word: the known one that is spelt nearly so, else all of them."""
    near = difflib.get_close_matches(word, known := list(known), n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def fit(name: str, value: Any, kind: Any) -> Any:
    """A setting's value as its type wants it: single values become lists, and commas part the words of a string.

    Raises:
        ValueError: when it does not fit.
    """
    kinds = kinds_of(kind)
    if list[str] in kinds:
        values = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        if all(isinstance(x, (str, int, float)) and not isinstance(x, bool) for x in values):
            return [str(x).strip() for x in values if str(x).strip()]
    if int in kinds and str in kinds and isinstance(value, str) and value.strip().isdigit():
        return int(value)  # a command line's number
    for one in kinds:
        if one is type(None) and value is None:
            return None
        if one is float and type(value) is int:
            return float(value)
        if type(value) is one:
            return value
    wanted = " or ".join(
        "nothing" if k is type(None) else "list" if k == list[str] else k.__name__ for k in kinds
    )
    raise ValueError(f"{name}={value!r}: must be {wanted}, is {type(value).__name__}")


def kinds_of(kind: Any) -> tuple[Any, ...]:
    """The types that a value may have: the parts of a union, or the type alone."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
