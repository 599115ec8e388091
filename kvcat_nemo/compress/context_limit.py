"""How long a text a model may read: the one place where that is decided.

max_position_embeddings is the limit. Models whose rotary frequencies change with the length of the text ("dynamic", "longrope")
are refused before (kvcat_nemo.models, compress.hf_attention.check_model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_FIELD = "max_position_embeddings"


def position_limit(config: Any) -> int:
    """Tokens that a text may have.

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
    return limit


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
    limit = position_limit(config)
    for row, (length, count) in enumerate(zip(lengths, more, strict=True)):
        if length + count > limit:
            where = f", row {row}" if len(lengths) > 1 else ""
            size = f"{length} tokens" if not count else f"{length + count} tokens ({length} and {count} more)"
            raise ValueError(f"{what} of {size}{where}: the model reads {limit} ({_FIELD}); {fix}")


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _default(config: Any) -> Any:
    from transformers import CONFIG_MAPPING

    kind = _field(config, "model_type")
    return getattr(CONFIG_MAPPING[kind](), _FIELD, None) if kind in CONFIG_MAPPING else None
