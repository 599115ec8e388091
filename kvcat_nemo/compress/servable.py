"""The form of a cache that engines take: equal counts, no biases, positions without gaps, one dtype.

Engines believe in a prefix of C tokens: the same number of slots in every layer and KV head, a multiple of a page's size, read
by plain attention, the next token at position C. A text of T tokens that was compressed to C slots is brought into that form by

1. a budget rounded up to whole blocks of slots,
2. biases folded into the keys (folding.py),
3. every key rotated by C − T positions: distances to later tokens stay exactly those of the text.

The cache then stands for C tokens (`lengths_B`): this project's own decoding reads it as it reads any cache.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcat_nemo.common.limits import check_upper
from kvcat_nemo.compress.attention_matching import AttentionMatching
from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.compressor import Compressed, Compressor
from kvcat_nemo.compress.folded import Folded, folded
from kvcat_nemo.compress.kivi import Quantisation
from kvcat_nemo.compress.prefill import Prefilled, prefill
from kvcat_nemo.compress.rotation import rotated
from kvcat_nemo.compress.stack import Stack

DTYPES = ("float32", "bfloat16", "float16")
FORM = 1
"""Version of the form, in facts["servable"]."""


@dataclass(frozen=True)
class Servable:
    """What an engine asks of a cache.

    Raises:
        ValueError: on a value out of range.
    """

    block: int = 16
    """Slots are a multiple of this: tokens of an engine's page (vLLM: 16 on GPUs)."""
    dtype: str | None = None
    """Of keys and values: float32, bfloat16 or float16, that of the engine; None: the model's as it is loaded."""

    def __post_init__(self):
        if type(self.block) is not int or self.block < 1:
            raise ValueError(f"block={self.block!r}: give a whole number of slots of at least 1; 16 is usual")
        check_upper("block", self.block, "block")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: choose among {', '.join(DTYPES)}")

    def slots(self, budget: Budget, length: int) -> int:
        """Slots of a text of `length` tokens: the budget's, rounded up to whole blocks, never more than the text has.

        Raises:
            ValueError: when the text is shorter than a block.
        """
        most = length // self.block * self.block
        if not most:
            raise ValueError(
                f"block={self.block}: a text of {length} tokens is shorter than one block; give a longer text or a smaller block"
            )
        return min(-(-budget.slots(length) // self.block) * self.block, most)


def check_can_serve(compressor: Compressor) -> None:
    """Refuse compressors whose caches no engine takes, before any work.

    Raises:
        ValueError: names what the cache would have.
    """
    if isinstance(compressor, Quantisation | Stack):
        code = compressor.quantisation if isinstance(compressor, Stack) else compressor
        raise ValueError(
            f"compressor {compressor}: {code.name} keeps slots as {code.bits}-bit codes, which engines cannot read; leave"
            f" {code.name} out and choose the dtype, bfloat16 or float16"
        )


def compress_servable(
    model: PreTrainedModel, ids: Iterable[int], compressor: Compressor, budget: Budget, form: Servable
) -> Compressed:
    """Read one text and compress it into a cache that engines take.

    Raises:
        ValueError: for a model, compressor or budget that has no such form, before any work where that is known before.
    """
    check_can_serve(compressor)
    ids = list(ids)
    slots = form.slots(budget, len(ids))
    prefilled = prefill(model, [ids], needs={*compressor.needs, "queries"})
    return compressed(prefilled, compressor, budget, slots, form)


@torch.no_grad()
def compressed(
    prefilled: Prefilled, compressor: Compressor, budget: Budget, slots: int, form: Servable
) -> Compressed:
    """As `compress_servable`, of a text that was read with its queries recorded, at a number of slots."""
    began = time.perf_counter()
    maker = compressor
    if type(compressor) is AttentionMatching:  # folds as it goes: one reading less
        maker = Folded(**{f.name: getattr(compressor, f.name) for f in fields(compressor)})
    if slots < prefilled.lengths[0]:
        cache = maker.compress(prefilled, Budget(tokens=slots))
        check_even(cache, str(compressor))
        cache = folded(prefilled, cache)
    else:
        cache = prefilled.cache.row(0)
        cache.facts["compressor"] = str(compressor)
    cache.facts["budget"] = asdict(budget)
    return Compressed(
        anchored(prefilled.model, cache, slots, form, text_tokens=prefilled.lengths[0]),
        prefilled.cache.nbytes,
        time.perf_counter() - began,
    )


def check_even(cache: KVCache, what: str) -> int:
    """The number of slots that every layer and head has.

    Raises:
        ValueError: numbers differ, or slots are codes.
    """
    counts = []
    for number, layer in enumerate(cache.layers):
        if type(layer) is not LayerCache:
            raise ValueError(
                f"{what}: layer {number} holds codes of {layer.settings.get('bits', 'few')} bits (int8, int4), which"
                " engines cannot read"
            )
        slots_G = layer.slots_BG[0]
        counts.append((int(slots_G.min()), int(slots_G.max())))
    low, high = min(x for x, _ in counts), max(x for _, x in counts)
    if low != high:
        uneven = next((n for n, (a, b) in enumerate(counts) if a != b), None)
        where = (
            f"layer {uneven} has heads of {counts[uneven][0]} to {counts[uneven][1]} slots (head budgets)"
            if uneven is not None
            else f"layers have {low} to {high} slots (layer budgets)"
        )
        raise ValueError(
            f"{what}: {where}; an engine counts one number of slots for all: take a compressor that gives all heads as many"
        )
    return low


def anchored(
    model: PreTrainedModel, cache: KVCache, slots: int, form: Servable, *, text_tokens: int
) -> KVCache:
    """Keys moved so that the next token stands at position `slots`, in the form's dtype.

    Args:
        text_tokens: how many tokens of text the cache stands for, for its facts.

    Raises:
        ValueError: when a number does not fit into the dtype.
    """
    length = int(cache.lengths_B[0])
    name = form.dtype or str(model.dtype).removeprefix("torch.")
    dtype, layers = getattr(torch, name), []
    for number, layer in enumerate(cache.layers):
        wide = torch.promote_types(torch.float32, layer.keys_BGSD.dtype)
        keys = rotated(layer.keys_BGSD.to(wide), slots - length, model)
        kept = LayerCache(keys.to(dtype), layer.values_BGSE.to(dtype), torch.zeros_like(layer.bias_BGS))
        for which, x in (("keys", kept.keys_BGSD), ("values", kept.values_BGSE)):
            if not bool(x.isfinite().all()):
                raise ValueError(
                    f"dtype={name}: {which} of layer {number} are beyond its largest number, {torch.finfo(dtype).max:g}; take"
                    " bfloat16 or float32"
                )
        layers.append(kept)
    facts = dict(cache.facts)
    facts["servable"] = {
        "form": FORM,
        "slots": slots,
        "block": form.block,
        "dtype": name,
        "text_tokens": text_tokens,
    }
    return KVCache(layers, torch.full_like(cache.lengths_B, slots), facts)


def document_digest(ids: Iterable[int]) -> str:
    """sha256 of a document's token ids: the same text read by the same tokenizer."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def servable_facts(cache: KVCache, what: str) -> dict[str, Any]:
    """What a servable cache says of its form, checked against what it holds.

    Args:
        what: the file, for messages.

    Raises:
        ValueError: not servable, or damaged.
    """
    facts = cache.facts.get("servable")
    if facts is None:
        raise ValueError(
            f"{what}: the cache is not in the form that engines take; make it again with kvcat compress … --servable"
        )
    names = {"form": int, "slots": int, "block": int, "dtype": str, "text_tokens": int}
    if not isinstance(facts, dict) or any(type(facts.get(n)) is not kind for n, kind in names.items()):
        raise ValueError(f"{what}: damaged cache file (servable = {facts!r}); compress the text again")
    if min(facts["slots"], facts["block"], facts["text_tokens"]) < 1 or facts["slots"] % facts["block"]:
        raise ValueError(f"{what}: damaged cache file (servable = {facts!r}); compress the text again")
    if facts["form"] != FORM:
        raise ValueError(
            f"{what}: form {facts['form']} of servable caches, this version knows {FORM}; compress again"
        )
    slots = check_even(cache, what)
    dtypes = {str(x.dtype).removeprefix("torch.") for layer in cache.layers for x in layer.read()}
    biased = any(layer.has_bias for layer in cache.layers)
    if (
        cache.batch != 1
        or biased
        or dtypes != {facts["dtype"]}
        or {slots, int(cache.lengths_B[0])} != {facts["slots"]}
    ):
        raise ValueError(
            f"{what}: damaged cache file (it says {facts['slots']} slots of {facts['dtype']} without bias; it holds"
            f" {cache.batch} rows of {slots} slots of {', '.join(sorted(dtypes))}{' with biases' if biased else ''});"
            " compress the text again"
        )
    return facts
