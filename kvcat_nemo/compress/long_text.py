"""Documents longer than the model's window: read in chunks, each compressed, all of them one servable cache.

fold      each chunk is read alone
rolling   each chunk is read behind the compressed chunks before it

Chunk i of N tokens becomes c slots that take the positions behind those of the chunks before: the end of chunk i stands at
position c_1 + … + c_i, distances inside a chunk stay the text's, and chunks move together. No distance that a later token meets is
then longer than all slots and one chunk, however long the text is: that must be within the model's window. Memory is that of one chunk
and all slots, and so is the time for a token of a chunk.

Chunks that are done are kept beside the result until all are: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvcat_nemo.compress.attention_matching import AttentionMatching
from kvcat_nemo.compress.baselines import Random, Recent
from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.context_limit import position_limit
from kvcat_nemo.compress.fit import remember
from kvcat_nemo.compress.hf_attention import OverCache, run
from kvcat_nemo.compress.prefill import Prefilled, check_ids, prefill
from kvcat_nemo.compress.rotation import rotated
from kvcat_nemo.compress.servable import Servable, anchored, check_can_serve, compressed
from kvcat_nemo.compress.storage import load, save

MODES = ("fold", "rolling")


@dataclass(frozen=True)
class Chunk:
    """A part of the text, and where its slots go."""

    first: int
    """Place of its first token in the text."""
    last: int
    before: int
    """Slots of the chunks before it."""
    slots: int


def chunks_of(
    length: int, budget: Budget, form: Servable, limit: int, most: int | None = None
) -> list[Chunk]:
    """Chunks of almost equal sizes, each with its share of the budget in whole blocks.

    Args:
        length: tokens of the text; limit: tokens that the model reads; most: tokens of a chunk at most, None for half the limit.

    Raises:
        ValueError: a chunk beyond the window, or shorter than a block; slots that leave no room.
    """
    most = limit // 2 if most is None else most
    if not form.block <= most <= limit:
        raise ValueError(
            f"chunk={most}: give at least a block, {form.block}, and at most what the model reads, {limit}"
        )
    count = -(-length // most)
    ends = [length * (i + 1) // count for i in range(count)]
    if length // count < form.block:
        raise ValueError(
            f"chunk={most}: chunks of {length // count} tokens, a block is {form.block}; give larger chunks"
        )
    out, before = [], 0
    # Shares are rounded where a chunk ends, not one by one: all of them together are the budget in whole blocks.
    total = form.slots(budget, length)
    for first, last in zip([0, *ends], ends, strict=False):
        end = -(-total * last // (length * form.block)) * form.block
        slots = min(end - before, (last - first) // form.block * form.block)
        if slots < form.block:
            raise ValueError(
                f"{total} slots for {count} chunks: a chunk would keep less than a block of {form.block}; keep more (--keep), or give"
                " larger chunks"
            )
        out.append(Chunk(first, last, before, slots))
        before += slots
    reach = before + max(c.last - c.first for c in out)
    if reach >= limit:
        raise ValueError(
            f"{before} slots for {length} tokens and a chunk of {reach - before}: {reach} positions, the model reads {limit}; keep"
            f" fewer slots (--keep), or give smaller chunks"
        )
    return out


def check_rolls(compressor: Compressor) -> Compressor:
    """The compressor as it is used behind other chunks, where nothing can be read a second time.

    Raises:
        ValueError: one that reads the context again.
    """
    if isinstance(compressor, AttentionMatching) and type(compressor) is AttentionMatching:
        return replace(compressor, queries="context")
    if isinstance(compressor, Recent | Random):
        return compressor
    raise ValueError(
        f"compressor {compressor}: it reads the context again, which `rolling` cannot do behind other chunks; take"
        " attention-matching, or fold"
    )


@torch.no_grad()
def compress_long(
    model: PreTrainedModel,
    ids: list[int],
    compressor: Compressor,
    budget: Budget,
    form: Servable,
    *,
    mode: str = "fold",
    chunk: int | None = None,
    parts: Path | None = None,
    progress: Callable[[Iterator], Iterator] = lambda x: x,
) -> KVCache:
    """A servable cache of a text of any length.

    Args:
        mode: of MODES; chunk: tokens of a chunk at most.
        parts: folder for finished chunks, for `remove_parts` once the result is on disk; None: none are kept.
        progress: wraps the loop over chunks.

    Raises:
        ValueError: before any work, for a mode, a compressor or sizes that do not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose among {', '.join(MODES)}")
    check_can_serve(compressor)
    maker = check_rolls(compressor) if mode == "rolling" else compressor
    ids = check_ids(ids, model.config.vocab_size, "context")
    chunks = chunks_of(len(ids), budget, form, position_limit(model.config), chunk)
    made = remember(model)
    chain = json.dumps([mode, str(maker), asdict(form), made["made_by"]["weights"]])
    done: list[KVCache] = []
    for part in progress(chunks):
        text = ids[part.first : part.last]
        chain = hashlib.sha256(f"{chain} {part} {text}".encode()).hexdigest()
        known = _kept(parts, chain, model.get_input_embeddings().weight.device)
        if known is None:
            known = _read(model, text, maker, part, form, done if mode == "rolling" else [])
            known.facts = {"part": chain}
            if parts is not None:
                parts.mkdir(exist_ok=True)
                save(known, parts / f"{chain[:16]}.part")
        done.append(known)
    slots = chunks[-1].before + chunks[-1].slots
    cache = joined(done)
    cache.facts = {**made, "compressor": str(compressor), "budget": asdict(budget)}
    cache.facts["chunks"] = {
        "mode": mode,
        "count": len(chunks),
        "tokens": max(c.last - c.first for c in chunks),
    }
    return anchored(model, cache, slots, form, text_tokens=len(ids))


def remove_parts(parts: Path) -> None:
    """Remove the finished chunks of a text whose cache has been saved, and their folder when nothing else lies in it."""
    for file in parts.glob("*.part"):
        file.unlink()
    if parts.is_dir() and not any(parts.iterdir()):
        parts.rmdir()


def joined(parts: list[KVCache]) -> KVCache:
    """Slots of chunks one behind the other; the next token stands behind the last."""
    layers = []
    for layer in zip(*(part.layers for part in parts), strict=True):
        reads = [x.read() for x in layer]
        keys, values = (torch.cat([r[i] for r in reads], 2) for i in range(2))
        layers.append(LayerCache(keys, values, torch.zeros(keys.shape[:3], device=keys.device)))
    return KVCache(layers, parts[-1].lengths_B)


def _kept(folder: Path | None, chain: str, device: torch.device) -> KVCache | None:
    if folder is None or not (file := folder / f"{chain[:16]}.part").is_file():
        return None
    try:
        cache = load(file).to(device)
    except ValueError:  # damaged, under a name that only a chunk of ours has: it is read again
        file.unlink()
        return None
    return cache if cache.facts.get("part") == chain else None


def _read(model, text, maker, part: Chunk, form: Servable, before: list[KVCache]) -> KVCache:
    """One chunk's slots at their positions: the next token stands at part.before + part.slots."""
    own = Servable(block=form.block)
    budget = Budget(tokens=part.slots)
    if before:
        prefilled = _behind(model, text, joined(before))
    else:
        prefilled = prefill(model, [text], needs={*maker.needs, "queries"})
    cache = compressed(prefilled, maker, budget, part.slots, own).cache
    # Keys of a chunk behind others carry the positions of those already; alone it begins at 0.
    moved = 0 if before else part.before
    layers = [LayerCache(rotated(x.keys_BGSD, moved, model), x.values_BGSE, x.bias_BGS) for x in cache.layers]
    return KVCache(layers, torch.full_like(cache.lengths_B, part.before + part.slots))


def _behind(model, text: list[int], cache: KVCache) -> Prefilled:
    """A chunk read behind a cache: its own slots, and its queries."""
    device = cache.lengths_B.device
    ids = torch.tensor([text], device=device)
    start = int(cache.lengths_B[0])
    handler = _Behind(cache)
    positions = start + torch.arange(len(text), device=device)[None]
    logits = run(model, ids, positions, handler, logits=1)
    lengths = torch.full_like(cache.lengths_B, len(text))
    own = KVCache(handler.own, lengths, remember(model))
    return Prefilled(model, ids, own, logits[:, -1], handler.scale, handler.queries)


class _Behind(OverCache):
    """Attention over a cache that notes the call's own slots and queries."""

    def __init__(self, cache: KVCache):
        super().__init__(cache)
        self.own: list[LayerCache] = []
        self.queries: list[torch.Tensor] = []
        self.scale = 0.0

    def attend(self, layer, q_BHND, k_BGND, v_BGNE, scale):
        self.own.append(LayerCache(k_BGND, v_BGNE, torch.zeros(k_BGND.shape[:3], device=k_BGND.device)))
        self.queries.append(q_BHND)
        self.scale = scale
        keys, values = self.layers[layer].read()  # without biases: one mask for all heads is enough
        S, N = keys.shape[2], k_BGND.shape[2]
        seen_NS = torch.ones(N, S + N, dtype=torch.bool, device=q_BHND.device).tril(S)
        k, v = (torch.cat([a.to(b.dtype), b], 2) for a, b in ((keys, k_BGND), (values, v_BGNE)))
        return F.scaled_dot_product_attention(
            q_BHND, k, v, attn_mask=seen_NS, scale=scale, enable_gqa=k.shape[1] != q_BHND.shape[1]
        )
