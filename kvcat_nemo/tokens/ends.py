"""End tokens: those at which a model stops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def end_ids(tokenizer, model=None, *, config: Any = None, generation_config: Any = None) -> tuple[int, ...]:
    """Every token that ends a text, ascending: the tokenizer's EOS, and eos_token_id (one or a list) of the model's
    generation_config and config. Chat models list several: the end of a turn and the end of a text.

    Args:
        tokenizer: may be None.
        model: a model of transformers, whose configurations are read; or give
        config, generation_config: objects or mappings (config.json and generation_config.json).

    Raises:
        ValueError: an eos_token_id that is neither a token id nor a list of them.
    """
    if model is not None:
        config, generation_config = model.config, getattr(model, "generation_config", None)
    found = set() if tokenizer is None or tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name, source in (("config", config), ("generation_config", generation_config)):
        found.update(_listed(name, source))
    return tuple(sorted(found))


def _listed(name: str, source: Any) -> list[int]:
    if source is None:
        return []
    value = (
        source.get("eos_token_id") if isinstance(source, Mapping) else getattr(source, "eos_token_id", None)
    )
    if hasattr(value, "tolist"):  # transformers keeps a tensor at times
        value = value.tolist()
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for one in values:
        if type(one) is not int or one < 0:
            raise ValueError(
                f"{name}: eos_token_id = {value!r}: must be a token id or a list of them; correct it"
            )
    return list(values)
