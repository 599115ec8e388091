"""How long a text a model may read: the one place where that is decided.

max_position_embeddings is the limit. Two kinds of rotary embedding also change their frequencies with the length of the
text, so that keys of a shorter one do not go with queries of a longer one: "dynamic" beyond max_position_embeddings, which
the limit covers, and "longrope" beyond original_max_position_embeddings: a text that begins below it must end below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FIELD = "max_position_embeddings"
_ORIGINAL = "original_max_position_embeddings"


def position_limit(config: Any, length: int = 0) -> int:
    """Tokens that a text of `length` tokens may grow to.

    Args:
        config: of a model of transformers, or the mapping in config.json (a field that is missing there has the value
            that transformers gives it).

    Raises:
        ValueError: no such limit, or one that is no whole number above 0.
    """
    limit = _field(config, _FIELD)
    if limit is None:
        limit = _default(config)
    if type(limit) is not int or limit < 1:
        raise ValueError(
            f"{_FIELD} = {limit!r}: must be a whole number above 0; correct the model's config.json"
        )
    rope = _field(config, "rope_parameters") or _field(config, "rope_scaling") or {}
    if not isinstance(rope, Mapping) or rope.get("rope_type", rope.get("type")) != "longrope":
        return limit
    marks = [_field(config, _ORIGINAL), rope.get(_ORIGINAL)]
    border = min((x for x in marks if type(x) is int and x > 0), default=limit)
    return border if length <= border else limit


def check_positions(
    config: Any, lengths: Sequence[int], new: int | Sequence[int] = 0, *, what: str, fix: str
) -> None:
    """Refuse texts that the model cannot read.

    Args:
        lengths: tokens that are there already, of each row; new: tokens that follow each of them.
        what: what the new tokens are, for the message; fix: what to do.

    Raises:
        ValueError: a row ends beyond its limit.
    """
    more = [new] * len(lengths) if isinstance(new, int) else list(new)
    for row, (length, count) in enumerate(zip(lengths, more, strict=True)):
        limit = position_limit(config, length)
        if length + count > limit:
            where = f", row {row}" if len(lengths) > 1 else ""
            whole = position_limit(config, limit + 1)
            why = (
                _FIELD
                if limit == whole
                else f"{_ORIGINAL}; beyond it longrope has other frequencies than the cache"
            )
            size = f"{length} tokens" if not count else f"{length + count} tokens ({length} and {count} more)"
            raise ValueError(f"{what} of {size}{where}: the model reads {limit} ({why}); {fix}")


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _default(config: Any) -> Any:
    from transformers import CONFIG_MAPPING

    kind = _field(config, "model_type")
    return getattr(CONFIG_MAPPING[kind](), _FIELD, None) if kind in CONFIG_MAPPING else None
