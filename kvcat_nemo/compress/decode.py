"""Going on from a cache: scores of a given text, and new text.

Shapes: B rows, N tokens (rows padded at the end), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcat_nemo.compress.cache import KVCache
from kvcat_nemo.compress.context_limit import check_positions
from kvcat_nemo.compress.fit import check_fits
from kvcat_nemo.compress.hf_attention import OverCache, run
from kvcat_nemo.compress.prefill import check_ids


def positions_after(cache: KVCache, N: int) -> Tensor:
    """Positions of the next N tokens of each row, [B, N]: those of the full text, whatever was dropped."""
    return cache.lengths_B[:, None] + torch.arange(N, device=cache.lengths_B.device)


def check_following(
    model: PreTrainedModel, cache: KVCache, ids_BN: Tensor, *, lengths_B: Tensor | None = None, more: int = 0
) -> None:
    """Check that cache and tokens go with the model and with each other, and do not end beyond what the model reads.

    Args:
        lengths_B: real tokens of each row, None for all; more: tokens that are to follow them.

    Raises:
        ValueError: see `extend`.
    """
    if ids_BN.dim() != 2 or ids_BN.shape[1] < 1 or ids_BN.is_floating_point():
        raise ValueError(
            f"ids {tuple(ids_BN.shape)} of {ids_BN.dtype}: give whole numbers, [rows, tokens], at least one"
        )
    check_fits(model, cache, ids_BN.shape[0])
    last = model.config.vocab_size - 1
    low, high = int(ids_BN.min()), int(ids_BN.max())
    if low < 0 or high > last:
        raise ValueError(f"ids from {low} to {high}: the model's vocabulary has token ids from 0 to {last}")
    N = ids_BN.shape[1]
    real = [N] * cache.batch if lengths_B is None else lengths_B.tolist()
    if len(real) != cache.batch or any(not 0 <= n <= N for n in real):
        raise ValueError(f"lengths {real}: give one for each of {cache.batch} rows, from 0 to {N}")
    lengths = cache.lengths_B.tolist()
    if any(length < 1 for length in lengths):
        raise ValueError(f"cache of {lengths} tokens of text: must be above 0; the cache is damaged")
    check_positions(
        model.config,
        lengths,
        [n + more for n in real],
        what="cache and what follows",
        fix="give fewer tokens, or compress a shorter text",
    )


def extend(
    model: PreTrainedModel, cache: KVCache, ids_BN: Tensor, *, lengths_B: Tensor | None = None
) -> tuple[Tensor, KVCache]:
    """Feed tokens after a cache.

    Args:
        ids_BN: next tokens of each row; lengths_B: how many of them are real, None for all.

    Returns:
        logits [B, N, V] after each token, and the cache with the tokens in it (the given one is left as it is).

    Raises:
        ValueError: when another model made the cache, rows do not agree, an id is none of the vocabulary, or the text would
            be longer than the model reads.
    """
    check_following(model, cache, ids_BN, lengths_B=lengths_B)
    return extend_checked(model, cache, ids_BN, lengths_B=lengths_B)


def extend_checked(
    model: PreTrainedModel, cache: KVCache, ids_BN: Tensor, *, lengths_B: Tensor | None = None
) -> tuple[Tensor, KVCache]:
    """As `extend`, of what was checked as a whole before (`check_following`): for loops over single tokens."""
    handler = OverCache(cache, grow=True, lengths_B=lengths_B)
    logits = run(model, ids_BN, positions_after(cache, ids_BN.shape[1]), handler)
    new = ids_BN.shape[1] if lengths_B is None else lengths_B
    return logits, KVCache(handler.layers, cache.lengths_B + new, dict(cache.facts))


def next_logits(model: PreTrainedModel, cache: KVCache, ids_BN: Tensor) -> Tensor:
    """Logits [B, N, V] after each of the tokens, fed after the cache, which stays as it is. Differentiable.

    Raises:
        ValueError: see `extend`.
    """
    check_following(model, cache, ids_BN)
    return logits_checked(model, cache, ids_BN)


def logits_checked(model: PreTrainedModel, cache: KVCache, ids_BN: Tensor) -> Tensor:
    """As `next_logits`, of what was checked before (`check_following`)."""
    return run(model, ids_BN, positions_after(cache, ids_BN.shape[1]), OverCache(cache))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    cache: KVCache,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    temperature: float = 0.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """New tokens after a cache of one row and a prompt. The cache stays as it is: ask it again.

    Args:
        prompt: token ids that follow the cached text (tokens.following_ids); at least one.
        stop_ids: tokens at which to stop; they are not returned. tokens.end_ids(tokenizer, model) gives all of a model's.
        temperature: 0 takes the likeliest token; else samples, by `seed`.

    Raises:
        ValueError: before any work, on an empty prompt, a cache of several rows or of another model, an id that is none of
            the vocabulary, a number out of range, or when cache, prompt and new tokens are more than the model reads.
    """
    if not prompt:
        raise ValueError(
            "prompt: give at least one token; the cache alone does not say what its last token predicts"
        )
    if cache.batch != 1:
        raise ValueError(f"cache of {cache.batch} rows: generate from one row, cache.row(b)")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r}: give a whole number of at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature!r}: give 0 (the likeliest token) or a number above it")
    prompt = check_ids(prompt, model.config.vocab_size, "prompt")
    device = cache.lengths_B.device
    feed = torch.tensor([prompt], device=device)
    check_following(model, cache, feed, more=max_new_tokens)
    generator = torch.Generator(device).manual_seed(seed)
    out: list[int] = []
    while len(out) < max_new_tokens:
        logits, cache = extend_checked(model, cache, feed)
        last = logits[0, -1].float()
        if temperature > 0:
            token = int(torch.multinomial((last / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(last.argmax())
        if token in stop_ids:
            break
        out.append(token)
        if on_token is not None:
            on_token(token)
        feed = torch.tensor([[token]], device=device)
    return out
