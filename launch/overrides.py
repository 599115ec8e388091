"""Overrides of a recipe, KEY=VALUE, before nemo-run reads them: what its parser would run, and which field it would set.

What nemo-run 0.11 does with a value (cli_parser.py): NAME, NAME(…) and [NAME, NAME(…)] are looked up, and the function is called:
a registered factory, a function of the program itself, or, with a dot in NAME, whatever an import finds: os.abort, without any
parentheses. A text that begins with Config or Partial, in quotes and lists too, imports a class by name. @FILE.yaml is read as
more of all that, and ${…} is filled in when the job runs. Keys are no better: trainer..devices, [trainer].devices and
`trainer.devices +=` all set trainer.devices. Here a value is a literal, a word or a text, and a key has one form.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

from kvcat_nemo.common.redact import redact
from kvcat_nemo.launch.values import has_control_characters

_OVERRIDE = re.compile(
    r"([\w\[\].]+)\s*([+*/|&-]?=)\s*(.+)", re.DOTALL
)  # nemo-run's own, but for the line feeds
_KEY = re.compile(r"[^\W\d]\w*(\[\d+\])*(\.[^\W\d]\w*(\[\d+\])*)*")
_CONFIG_FILE = re.compile(r"@[^:]*\.(yaml|yml|json|toml)(:.*)?", re.IGNORECASE | re.DOTALL)
_CALL = re.compile(r"[\w.]+\(.*\)", re.DOTALL)
_CONSTANTS = re.compile(r"torch\.(b?float16|float32|float64|half|int32|int64)")
"""Dotted names that are values: nemo-run imports torch, which is there anyway, and calls nothing."""
_MAIN = {"app", "main"}
"""Functions of the programs `nemo` and `kvcat`, which nemo-run finds by these words."""
_CODE = (
    ast.Call,
    ast.Lambda,
    ast.IfExp,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.NamedExpr,
)
_CODE += (ast.Await, ast.Yield, ast.YieldFrom, ast.FormattedValue)


class Override(NamedTuple):
    """One override, its key in the one form: parts joined by single dots."""

    key: str
    operator: str
    value: str


def read_override(argument: str) -> Override:
    """What an override sets, and to what.

    Raises:
        ValueError: when nemo-run would read something else than it seems to say, or run code; it says what to write.
    """
    shown = redact(argument) if argument.isprintable() else repr(redact(argument))[1:-1]
    if has_control_characters(argument):
        raise ValueError(f"{shown}: an override is one line; leave line breaks and control characters out")
    match = _OVERRIDE.fullmatch(argument)
    if not match or match[3].startswith("=") or not match[3].strip():
        raise ValueError(
            f"{shown}: not an override; give KEY=VALUE such as trainer.max_steps=100 (or += -= *= /= |= &=)"
        )
    key, operator, value = match.groups()
    if "__" in key:
        raise ValueError(
            f"{shown}: a key names fields of the recipe, such as trainer.max_steps; leave __ out"
        )
    if not _KEY.fullmatch(key):
        plain = ".".join(part for part in re.split(r"[.\[\]]+", key) if part)
        raise ValueError(
            f"{shown}: the key is not of the form a.b[0].c; give {plain}{operator}{redact(value.strip())}, if that is meant"
        )
    try:
        check_override_value(value)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    return Override(key, operator, value.strip())


def key_of(argument: str) -> str | None:
    """The key of an override in its one form, with single dots; None for another word of a command line."""
    match = _OVERRIDE.fullmatch(argument)
    if not match or match[3].startswith("="):
        return None
    return re.sub(r"\[(?!\d+\])|(?<!\d)\]|\.(?=\.)", "", match[1]).strip(".")


def check_override_value(value: str) -> None:
    """Refuse a value that nemo-run would not take as it stands: calls, imports, files of configuration, references.

    Raises:
        ValueError: saying what nemo-run would do, and what to write.
    """
    text = value.strip()
    if _CONFIG_FILE.fullmatch(text):
        raise ValueError(
            "nemo-run would read a file of more settings, unchecked; write them out as overrides"
        )
    if "${" in text:
        raise ValueError("nemo-run would fill in ${…} when the job runs, unchecked; write the value itself")
    if text.lstrip("\"'<[({ ").startswith(("Config", "Partial")):
        raise ValueError("nemo-run would import and build a class by that name; set its fields instead")
    try:
        if any(x.lstrip("\"'< ").startswith(("Config", "Partial")) for x in _texts(text)):
            raise ValueError("nemo-run would import and build a class by that name; set its fields instead")
        if _literal(text) is None:
            _check_text(text)
    except RecursionError:
        raise ValueError("not to be read as a value; give a literal that is less deep") from None


def _literal(text: str) -> tuple[object] | None:
    """The value of a literal, in a tuple; None when the text is none."""
    try:
        return (ast.literal_eval(text),)
    except (ValueError, SyntaxError, TypeError, MemoryError):
        return None


def _texts(literal: object) -> Iterable[str]:
    """All texts in a value, and in what nemo-run makes of them: it takes double quotes off and reads what is inside again."""
    if isinstance(literal, str):
        yield literal
        inside = _literal(literal.strip('"')) or _literal(literal)
        yield from _texts(inside[0]) if inside else ()
    elif isinstance(literal, dict):
        for pair in literal.items():
            yield from _texts(pair)
    elif isinstance(literal, list | tuple | set | frozenset):
        for item in literal:
            yield from _texts(item)


def _check_text(text: str) -> None:
    """Of a text that is no literal: nemo-run calls what it can find by that name, and else takes it as a string."""
    if text.startswith("[") and text.endswith("]"):
        for item in text.strip("[] ").split(","):
            if not re.fullmatch(r"\w*", item.strip()):
                raise ValueError("not a list of plain values; write each text in it in quotes: ['a', 'b']")
            _check_text(item.strip())
        return
    if _CALL.fullmatch(text) or _is_code(text):
        raise ValueError(
            "nemo-run would run that, or other versions of it would; give a plain value, and a text in quotes: KEY='…'"
        )
    if not re.fullmatch(r"[\w.]+", text) or _CONSTANTS.fullmatch(text):
        return
    if "." in text.strip("."):
        raise ValueError(
            f"nemo-run would import {text.rpartition('.')[0]} and call {text}; if it is a text, give KEY='{text}'"
        )
    main = sys.modules.get("__main__")
    if text in _MAIN or text.startswith("__") or callable(getattr(main, text, None)):
        raise ValueError(f"nemo-run would call its program's own {text}; if it is a text, give KEY='{text}'")


def _is_code(text: str) -> bool:
    """Whether Python would run something to find the value. A path is not Python, or is only divisions."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return bool(re.match(r"lambda\b", text))
    return any(isinstance(node, _CODE) for node in ast.walk(tree))


def touches(key: str, field: str) -> bool:
    """Whether setting `key` sets `field`, a part of it, or what holds it."""
    key = re.sub(r"\[(\d+)\]", r".\1", key)
    return key == field or field.startswith(f"{key}.") or key.startswith(f"{field}.")


def factory_call(name: str, arguments: dict[str, object]) -> str:
    """A recipe with its arguments as nemo-run reads it back: it parts them at every comma and knows no escapes.

    Raises:
        ValueError: naming an argument that does not survive its reading.
    """
    if not re.fullmatch(r"[^\W\d]\w*", name) or name in _MAIN or name.startswith("__"):
        raise ValueError(f"recipe {name!r}: not the name of a recipe (kvcat train list)")
    return f"{name}({', '.join(f'{key}={_argument(key, value)}' for key, value in arguments.items())})"


def _argument(key: str, value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    wrong = f"{key}={redact(text)!r}"
    if "," in text or "\\" in text or has_control_characters(text):
        raise ValueError(
            f"{wrong}: nemo-run parts arguments at commas and takes backslashes and line breaks otherwise; use a name without them, "
            "or, for a list, an override such as data.paths=['a', 'b']"
        )
    if not isinstance(value, str):
        return text
    quote = '"' if "'" in text else "'"
    if quote in text or (quote == '"' and text.lstrip("'< ").startswith(("Config", "Partial"))):
        raise ValueError(
            f"{wrong}: nemo-run cannot read both kinds of quotes in one value; use a name without them"
        )
    if quote == '"' and text.startswith("'") and text.endswith("'"):
        raise ValueError(f"{wrong}: nemo-run would take the quotes off; use a name without them")
    return f"{quote}{text}{quote}"
