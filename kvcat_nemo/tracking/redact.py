"""Credentials stay out of logs, parameters, manifests and warnings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "***"

# user:password@ of a URI; a raw @ in the password belongs to it, a slash cannot.
_USERINFO = re.compile(r"(?<=://)[^/\s'\"<>]+@")
_WORDS = (
    r"(?:passw(?:or)?d|passphrase|pwd|secrets?|credentials?|authorization|"
    r"(?:api|access|private|secret|account|storage)_?key(?:_id)?|"
    r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)token)"
)
# As the last part of a dotted or underscored name: model.hf_token, but not tokenizer, tokens or eos_token.
_SECRET_NAME = re.compile(rf"(?:^|[._\-\[\]]){_WORDS}\]?$", re.IGNORECASE)
_SECRET_QUERY = re.compile(rf"((?:[?&;]|\b){_WORDS}=)[^&;\s'\"]+", re.IGNORECASE)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w\-.~+/]{6,}=*")
# Anywhere in a variable's name, and written together too (PGPASSWORD, AUTHTOKEN, AWS_SECRET_ACCESS_KEY), but not
# TOKENIZERS_PARALLELISM, MAX_TOKENS or PWD.
_SECRET_VARIABLE = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|AUTHORIZATION|(?:API|ACCESS|PRIVATE|ACCOUNT|STORAGE)_?KEY|TOKEN(?:_|$)|_PWD$",
    re.IGNORECASE,
)
# A shorter value is no secret worth the name, and hiding it would eat words out of every message.
_SHORTEST = 6


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
    """`text` with credentials in URIs, secret query parameters, bearer tokens and secrets of the environment hidden."""
    for secret in environment_secrets() if secrets is None else secrets:
        text = text.replace(secret, HIDDEN)
    text = _USERINFO.sub(f"{HIDDEN}@", text)
    text = _SECRET_QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return _BEARER.sub(rf"\1 {HIDDEN}", text)


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
    """Whether a setting of this name holds a credential."""
    return bool(_SECRET_NAME.search(name))


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a credential."""
    return bool(_SECRET_VARIABLE.search(name))


def looks_like_a_secret(name: str, value: str) -> bool:
    """Whether a variable with this value would tell a credential to whoever reads it.

    launch/common.sh has the same for the shell, but for values that equal a secret of the environment.
    """
    return bool(value) and (is_secret_variable(name) or redact(value) != value)


def refuse_credentials(arguments: Iterable[str]) -> None:
    """Refuse credentials on a command line, which every user of the machine can read and NeMo writes to a file.

    Raises:
        ValueError: naming the argument, without what it holds.
    """
    secrets = environment_secrets()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        named = bool(equals) and is_secret_name(name) and value.strip("'\"") not in ("", "None")
        if named or redact(argument, secrets) != argument:
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
