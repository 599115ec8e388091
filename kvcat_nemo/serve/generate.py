"""Compressed documents in transformers' own `generate`: a plain DynamicCache, stock attention, every way of decoding.

    cache = load_cache("manual.kv", model)
    inputs = inputs_for(cache, tokenizer, "How is the pump cleaned?")
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])

transformers counts a cache's tokens and takes as many off the front of `input_ids`: `inputs_for` puts the document's placeholder
ids there. The model never sees them.

Shapes: B rows, N tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvcat_nemo.compress.fit import check_fits
from kvcat_nemo.serve.document import Document, read_document
from kvcat_nemo.tokens import IdRules, following_ids
from kvcat_nemo.tokens.chat import prompt_ids
from kvcat_nemo.tokens.conversation import conversation_ids, next_turn_ids


def load_cache(path: str | Path, model: PreTrainedModel, *, rows: int = 1) -> DynamicCache:
    """A servable cache as transformers' own, ready for `model.generate(past_key_values=…)`.

    A cache grows with what is generated: load it once and `fork` it for every question.

    Args:
        rows: rows of the batch, times num_beams (num_return_sequences) where there are several.

    Raises:
        ValueError: not in the servable form, of another model or dtype, or damaged; names the file.
    """
    document, cache = read_document(path)
    own = str(model.dtype).removeprefix("torch.")
    if document.dtype != own:
        raise ValueError(
            f"{path}: keys and values of {document.dtype}, the model computes in {own}; load the model in {document.dtype}, or"
            f" compress with --cache-dtype {own}"
        )
    cache = cache.to(model.get_input_embeddings().weight.device)
    try:
        check_fits(model, cache)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    out = DynamicCache()
    for number, layer in enumerate(cache.layers):
        out.update(*(x.contiguous() for x in layer.read()), number)
    out.kvcat_document = document
    out.kvcat_placeholders = document.placeholder_ids(model.config.vocab_size)
    return fork(out, rows=rows) if rows != 1 else out


def fork(cache: DynamicCache, *, rows: int | None = None) -> DynamicCache:
    """A copy that grows by itself: of the document alone or of a dialogue so far.

    Args:
        rows: repeat a cache of one row so many times; None: as it is.

    Raises:
        ValueError: several rows of a cache that has several already.
    """
    out = copy.deepcopy(cache)
    if rows is not None:
        if type(rows) is not int or rows < 1:
            raise ValueError(f"rows={rows!r}: give a whole number of at least 1")
        if out.layers[0].keys.shape[0] != 1:
            raise ValueError(
                f"rows={rows}: the cache has {out.layers[0].keys.shape[0]} rows already; fork one of a single row"
            )
        if rows > 1:
            out.batch_repeat_interleave(rows)
    return out


def inputs_for(
    cache: DynamicCache,
    tokenizer,
    prompts: str | Sequence[str] | None = None,
    *,
    messages: Sequence[dict] | None = None,
    so_far: Tensor | None = None,
    special_tokens: str = "text",
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` for `generate`: placeholders for the document, then what is asked.

    Args:
        cache: what `load_cache` made; where prompts are several, of as many rows.
        prompts: one or several; shorter ones are padded between the document and the prompt. A document that was compressed in
            a chat template gets the template's rest behind the prompt.
        messages: a whole conversation instead, as a chat template takes it.
        so_far: what `generate` returned, [1, N], for the next turn of a dialogue with the same cache.
        special_tokens: as tokens.IdRules.

    Raises:
        ValueError: a cache of another origin, nothing asked, or rows that do not agree.
    """
    document: Document | None = getattr(cache, "kvcat_document", None)
    if document is None:
        raise ValueError("cache: not one that kvcat_nemo.serve.load_cache made")
    if (prompts is None) == (messages is None):
        raise ValueError("inputs_for: give either prompts or messages")
    device = cache.layers[0].keys.device
    rows = cache.layers[0].keys.shape[0]
    if so_far is not None:
        return _next_turn(cache, tokenizer, prompts, so_far, document)
    if messages is not None:
        asked = [conversation_ids(tokenizer, messages, document.made_in)]
    else:
        rules = IdRules("never", special_tokens)
        after = document.made_in["after"] if document.made_in else ""
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        asked = [prompt_ids(tokenizer, prompt, after, rules) for prompt in listed]
    if not asked or not all(asked):
        raise ValueError(
            "prompts: each needs at least one token; the cache alone does not say what its last token predicts"
        )
    if rows != len(asked) and (rows % len(asked) or len(asked) == 0):
        raise ValueError(
            f"prompts: {len(asked)} for a cache of {rows} rows; load it with rows={len(asked)} (times num_beams)"
        )
    longest = max(map(len, asked))
    ids = [cache.kvcat_placeholders + [0] * (longest - len(row)) + row for row in asked]
    mask = [
        [1] * len(cache.kvcat_placeholders) + [0] * (longest - len(row)) + [1] * len(row) for row in asked
    ]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _next_turn(cache, tokenizer, prompt, so_far: Tensor, document: Document) -> dict[str, Tensor]:
    if not isinstance(prompt, str) or so_far.dim() != 2 or len(so_far) != 1:
        raise ValueError(
            "so_far: dialogues go on one at a time: give one prompt and what generate returned, [1, N]"
        )
    known = so_far[0, : len(cache.kvcat_placeholders)].tolist()
    if known != cache.kvcat_placeholders:
        raise ValueError(
            "so_far: it does not begin with the document's placeholders; give what generate returned"
        )
    last = int(so_far[0, -1])
    ended = last in tokenizer.all_special_ids
    if document.made_in:
        new = next_turn_ids(tokenizer, prompt, document.made_in, ended)
    else:
        new = following_ids(tokenizer, prompt, IdRules("never", "text"))
    ids = torch.cat([so_far, torch.tensor([new], dtype=so_far.dtype, device=so_far.device)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
