"""One context through a press of kvpress: the model left as it was found, what was kept taken over into our cache."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvcat_nemo.compress import compat
from kvcat_nemo.compress.context_limit import check_positions
from kvcat_nemo.compress.layers import LayerCache
from kvcat_nemo.compress.prefill import Prefilled
from kvcat_nemo.tokens import chat_form, load
from kvcat_nemo.tokens.chat import template_of


@dataclass
class Kept:
    """What a press left of one layer."""

    keys: Tensor
    """[1, G, S, D]"""
    values: Tensor
    """[1, G, S, E]"""
    masked_GS: Tensor
    """True for slots that are still stored but hidden from attention."""
    full: Any
    """Keys and values of all slots, as the press was given them."""


@contextmanager
def _within_limit(model, what: str):
    """Presses that feed the model more than the context (KVzip's repetition) must not go beyond what it reads."""

    def check(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if ids is None else ids
        cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
        end = given.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        if positions is not None:
            end = int(positions.max()) + 1
        check_positions(model.config, [end], what=what, fix="shorten the context")

    hook = model.model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _templates(press, prefilled: Prefilled, what: str):
    """Presses that re-read the context take the model's tokenizer from its folder, and its chat template for granted.

    A context that does not begin with the template's prefix is given a tokenizer without template: else the first
    tokens of the text would be taken for that prefix, left unscored and dropped.
    """
    if not isinstance(press, compat.kvpress().KVzipPress):
        yield
        return
    folder = prefilled.model.config.name_or_path
    try:
        tokenizer = load(folder)
    except ValueError as error:
        raise ValueError(
            f"{what}: it reads the context once more and needs the tokenizer in the model's folder, {folder!r}: {error}"
        ) from error
    tokenizer.chat_template = _template_before(tokenizer, prefilled.ids_BT[0].tolist())
    with compat.kvzip_tokenizer(tokenizer):
        yield


def _template_before(tokenizer, ids: list[int]) -> str | None:
    """The tokenizer's template that a context begins with; None where it begins with none."""
    named = tokenizer.chat_template
    for name in named if isinstance(named, dict) else ["default"] if named else []:
        try:
            prefix = chat_form(tokenizer, name).document_ids(tokenizer, "")
        except ValueError:
            continue  # made for other messages
        if ids[: len(prefix)] == prefix:
            return template_of(tokenizer, name)
    return None


@torch.no_grad()
def run_press(press, prefilled: Prefilled, implementation: str, what: str) -> list[Kept]:
    """Read the context under a press.

    Args:
        press: of kvpress, its compression_ratio set; implementation: the model's attention for this pass.
        what: name for messages.

    Raises:
        ValueError: with kvpress' own words, when the press refuses the context.
    """
    model = prefilled.model
    full: dict[int, Any] = {}

    def remember(module, args, kwargs, output):
        keys, values = compat.cached(kwargs["past_key_values"], module.layer_idx)
        # Later passes of a press (KVzip's repetition) append to the cache: the first one is the context.
        full.setdefault(module.layer_idx, SimpleNamespace(keys=keys.clone(), values=values.clone()))

    cache = DynamicCache()
    with ExitStack() as stack:
        stack.enter_context(compat.attention(model, implementation))
        modules = stack.enter_context(compat.left_as_found(model))
        stack.enter_context(_templates(press, prefilled, what))
        stack.enter_context(_within_limit(model, what))
        for module in modules:
            stack.callback(module.register_forward_hook(remember, with_kwargs=True).remove)
        try:
            with press(model):
                model.model(input_ids=prefilled.ids_BT, past_key_values=cache)
        except AssertionError as error:
            raise ValueError(f"{what}: kvpress refused the context: {error}") from error
        hidden = [compat.hidden_slots(module) for module in modules]
    kept = []
    for layer, places in enumerate(hidden):
        keys, values = compat.cached(cache, layer)
        masked = torch.zeros(keys.shape[1:3], dtype=torch.bool, device=keys.device)
        if places is not None:
            masked[places[0].to(keys.device), places[1].to(keys.device)] = True
        kept.append(Kept(keys, values, masked, full[layer]))
    return kept


def _fingerprints(keys_GSD: Tensor, values_GSE: Tensor) -> Tensor:
    """A number per slot from the very bits of its key and value, [G, S] int64."""
    ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    total = torch.zeros(keys_GSD.shape[:2], dtype=torch.int64, device=keys_GSD.device)
    for part, start in ((keys_GSD, 1), (values_GSE, 1_000_003)):
        bits = part.contiguous().view(ints[part.element_size()]).long()
        odd = torch.arange(part.shape[-1], device=part.device) * 0x9E3779B97F4A7C1 + start
        total += (bits * (2 * odd + 1)).sum(-1)
    return total


def _places(full, kept: Kept) -> Tensor | None:
    """Where each kept slot stood in the text, [1, G, S]; None when a press made new keys or values."""
    was, found = _fingerprints(full.keys[0], full.values[0]), _fingerprints(kept.keys[0], kept.values[0])
    ordered, order = was.sort(-1)
    at = torch.searchsorted(ordered, found).clamp_max(ordered.shape[-1] - 1)
    place = order.gather(-1, at)[None]
    for a, b in ((full.keys, kept.keys), (full.values, kept.values)):
        if not torch.equal(a.gather(2, place[..., None].expand(*place.shape, a.shape[-1])), b):
            return None
    return place


def taken_over(ours: LayerCache, kept: Kept) -> LayerCache:
    """What a press left of a layer, as a layer of our cache: a selection of our slots where it is a selection."""
    present = ~kept.masked_GS[None]
    place = _places(kept.full, kept)
    if place is None:
        place = torch.arange(kept.keys.shape[2], device=present.device).expand(present.shape)
        ours = LayerCache(kept.keys, kept.values, torch.zeros(present.shape, device=present.device))
    # Text order, what is not there last.
    order = place.masked_fill(~present, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)
    order = order[..., : int(present.sum(-1).max())]
    return ours.take(place.gather(-1, order), present.gather(-1, order))
