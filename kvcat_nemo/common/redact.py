"""Credentials stay out of job files, logs, parameters, manifests and warnings. The one answer to "is that a credential?"."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"
TABLE = Path(__file__).with_name("secrets.tsv")
"""What a credential looks like; launch/common.sh reads the same file."""

ADVICE = (
    "it would be written to a file, or shown to other users. Export a variable in the shell that submits and give its name "
    "alone (--env NAME), read it from a file that only you can read, or put it into the Kubernetes Secret JOB-env"
)

# A shorter value is no secret worth the name, and hiding it would eat words out of every message.
_SHORTEST = 6


class _Row(NamedTuple):
    pattern: re.Pattern[str]
    what: str


@cache
def _rows(kind: str) -> tuple[_Row, ...]:
    """The table's rows of a kind. `keep` is a named group; POSIX' classes are written as Python has them."""
    out = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        of, case, keep, pattern, what = line.split("\t")
        if of == kind:
            text = f"(?P<keep>{'' if keep == '-' else keep})(?:{pattern})"
            text = text.replace("[:space:]", r"\s").replace("[:alnum:]", "A-Za-z0-9")
            out.append(_Row(re.compile(text, re.IGNORECASE if case == "i" else 0), what))
    return tuple(out)


def _without_plain(text: str) -> str:
    """`text` with what only looks like a credential blotted out, each letter by one other, so that places stay."""
    for row in _rows("plain"):
        text = row.pattern.sub(lambda m: m["keep"] + "!" * (len(m[0]) - len(m["keep"])), text)
    return text


def _found(text: str) -> Iterator[tuple[int, int, str]]:
    """Where credentials stand in a text, and what each is."""
    searched = _without_plain(text)
    for row in _rows("text"):
        for match in row.pattern.finditer(searched):
            yield match.end("keep"), match.end(), row.what


def environment_secrets(environment: Mapping[str, str] | None = None) -> list[str]:
    """Values that the environment holds in confidence: of variables named so, and passwords inside URIs. Longest first."""
    environment = os.environ if environment is None else environment
    found: set[str] = set()
    for name, value in environment.items():
        # The path of a file of secrets is none.
        if is_secret_variable(name) and not os.path.exists(value):
            found.add(value)
        for part in re.findall(r"\S+://\S+", value) if "@" in value else ():
            password = _password(part)
            if password:
                found |= {password, unquote(password), quote(unquote(password), safe="")}
    return sorted((x for x in found if len(x) >= _SHORTEST), key=len, reverse=True)


def _password(uri: str) -> str | None:
    netloc = uri.partition("://")[2].split("/")[0]
    userinfo, at, _ = netloc.rpartition("@")
    return userinfo.partition(":")[2] or None if at else None


def redact(text: str, secrets: Iterable[str] | None = None) -> str:
    """`text` with credentials of every known form (secrets.tsv) and secrets of the environment hidden."""
    for secret in environment_secrets() if secrets is None else secrets:
        text = text.replace(secret, HIDDEN)
    out, at = [], 0
    for start, end, what in sorted(_found(text)):
        if end <= at:
            continue
        if start >= at:
            out += [text[at:start], HIDDEN]
        at = end
        if what.endswith("in an address"):
            out.append("@")  # so that the host stays readable
    return "".join([*out, text[at:]])


def what_secret(name: str, value: str, secrets: Iterable[str] | None = None) -> str | None:
    """What kind of credential a variable with this value would tell to whoever reads it; None: none.

    Args:
        name: the variable's or option's name; a name such as HF_TOKEN makes any value a credential.
        secrets: values held in confidence; None: those of the environment.
    """
    if not value:
        return None
    if is_secret_variable(name):
        return _rows("variable")[0].what
    for _, _, what in _found(value):
        return what
    if any(secret in value for secret in (environment_secrets() if secrets is None else secrets)):
        return "value of a credential in the environment"
    return None


def looks_like_a_secret(name: str, value: str) -> bool:
    """Whether a variable with this value would tell a credential to whoever reads it; launch/common.sh has the same."""
    return what_secret(name, value) is not None


def refuse_secrets(values: Iterable[tuple[str, str]]) -> None:
    """Refuse credentials in what is written to job files.

    Args:
        values: pairs of the name that a message may show, and the value that it may not.

    Raises:
        ValueError: naming the option and the kind of credential, without what it holds.
    """
    secrets = environment_secrets()
    for name, value in values:
        what = what_secret("", value, secrets)
        if what:
            raise ValueError(f"{name}=…: that looks like a secret ({what}); {ADVICE}")


def redact_tree(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """The same for nested plain values; of a key that names a secret, the whole value is hidden."""
    secrets = environment_secrets() if secrets is None else list(secrets)
    if isinstance(value, dict):
        return {
            key: HIDDEN if is_secret_name(str(key)) and item not in (None, "") else redact_tree(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_tree(item, secrets) for item in value]
    return redact(value, secrets) if isinstance(value, str) else value


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name holds a credential: model.hf_token, but not tokenizer, tokens or eos_token."""
    return any(row.pattern.search(_without_plain(name)) for row in _rows("setting"))


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a credential: PGPASSWORD, but not MAX_TOKENS or PWD."""
    return any(row.pattern.search(_without_plain(name)) for row in _rows("variable"))


def refuse_credentials(arguments: Iterable[str]) -> None:
    """Refuse credentials on a command line, which every user of the machine can read and NeMo writes to a file.

    Raises:
        ValueError: naming the argument, without what it holds.
    """
    secrets = environment_secrets()
    arguments = list(arguments)
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        named = (
            bool(equals)
            and is_secret_name(name.rstrip("+-*/|& "))
            and value.strip("'\" ") not in ("", "None")
        )
        follows = (
            before.startswith("-") and "=" not in before and what_secret("", f"{before} {argument}", secrets)
        )
        if named or follows or redact(argument, secrets) != argument:
            shown = redact(name, secrets) if equals else "an argument"
            raise ValueError(
                f"{shown}: credentials do not belong on a command line, which other users and log files see. For MLflow, set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) in the environment and give "
                "the address without them"
            )


def split_credentials(uri: str) -> tuple[str, str | None, str | None]:
    """A URI without its user and password, and those two, decoded (None when absent)."""
    scheme, separator, rest = uri.partition("://")
    netloc, slash, path = rest.partition("/")
    userinfo, at, host = netloc.rpartition("@")
    if not (separator and at) or not urlsplit(uri).scheme.startswith("http"):
        return uri, None, None  # a database driver needs its credentials in the URI
    user, _, password = userinfo.partition(":")
    return f"{scheme}://{host}{slash}{path}", unquote(user) or None, unquote(password) or None
