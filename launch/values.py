"""The form of every value that reaches a script, a directive of sbatch, a manifest or an environment: one table, values.tsv."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvcat_nemo.common.redact import refuse_secrets

TABLE = Path(__file__).with_name("values.tsv")
"""launch/common.sh reads the same file."""


@dataclass(frozen=True)
class Form:
    """What one option takes."""

    option: str
    variable: str | None
    """Variable of the environment by which the scripts hand it on."""
    pattern: re.Pattern[str] | None
    """Of the whole value; None: any text, of many lines too (shell code)."""
    least: int | None
    most: int | None
    example: str
    what: str


@cache
def forms() -> dict[str, Form]:
    """The table, by option."""
    out = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        option, variable, pattern, least, most, example, what = line.split("\t")
        out[option] = Form(
            option=option,
            variable=None if variable == "-" else variable,
            pattern=None if pattern == "-" else re.compile(_python(pattern)),
            least=None if least == "-" else int(least),
            most=None if most == "-" else int(most),
            example=example,
            what=what,
        )
    return out


def _python(pattern: str) -> str:
    """A POSIX expression for `re`: in POSIX a backslash between brackets is a letter like others."""
    return pattern.replace("\\", r"\\").replace("[:alnum:]", "A-Za-z0-9")


def check_value(option: str, value: object, *, shown: str | None = None) -> None:
    """Refuse a value that an option cannot take. Credentials are refused first, so that no message shows one.

    Args:
        option: a name of the table, such as `run-dir`.
        shown: how a message calls it; None: --option.

    Raises:
        ValueError: naming the option, its value, and what to give instead.
    """
    form, text, shown = forms()[option], str(value), shown or f"--{option}"
    refuse_secrets([(shown, text)])
    wrong = f"{shown}={_one_line(text)}"
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{wrong}: not UTF-8; give {form.what}, such as {form.example}") from None
    if has_control_characters(text, lines=form.pattern is None):
        raise ValueError(
            f"{wrong}: a line break or another control character would change the script; give {form.what}, such as {form.example}"
        )
    if form.pattern is None:
        return
    good = form.pattern.fullmatch(text)
    if good and form.least is not None:
        good = form.least <= int(text) and (form.most is None or int(text) <= form.most)
    if not good:
        raise ValueError(f"{wrong}: give {form.what}, such as {form.example}")


def check_environment(environment: Mapping[str, str], *names: str) -> None:
    """Check variables that hand options on, where they are set; a message names the variable.

    Raises:
        ValueError: as check_value.
    """
    for form in forms().values():
        value = environment.get(form.variable or "")
        if value and form.variable in names:
            check_value(form.option, value, shown=form.variable)


def own_variables() -> frozenset[str]:
    """Variables by which the scripts hand options on; --env may not set them behind the options' back."""
    return frozenset(f.variable for f in forms().values() if (f.variable or "").startswith("KVCAT_"))


def has_control_characters(text: str, *, lines: bool = False) -> bool:
    """Whether a text has control characters; with `lines`, line feeds and tabs are none."""
    return any((ord(c) < 32 or ord(c) == 127) and not (lines and c in "\n\t") for c in text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else repr(text)[1:-1]
