"""Going on from a cache: scores of a given text, and new text.

Shapes: B rows, N tokens (rows padded at the end), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcat_nemo.compress.attention import OverCache, run
from kvcat_nemo.compress.cache import KVCache


def positions_after(cache: KVCache, N: int) -> Tensor:
    """Positions of the next N tokens of each row, [B, N]: those of the full text, whatever was dropped."""
    return cache.lengths_B[:, None] + torch.arange(N, device=cache.lengths_B.device)


def extend(
    model: PreTrainedModel, cache: KVCache, ids_BN: Tensor, *, lengths_B: Tensor | None = None
) -> tuple[Tensor, KVCache]:
    """Feed tokens after a cache.

    Args:
        ids_BN: next tokens of each row; lengths_B: how many of them are real, None for all.

    Returns:
        logits [B, N, V] after each token, and the cache with the tokens in it (the given one is left as it is).
    """
    handler = OverCache(cache, grow=True, lengths_B=lengths_B)
    logits = run(model, ids_BN, positions_after(cache, ids_BN.shape[1]), handler)
    new = ids_BN.shape[1] if lengths_B is None else lengths_B
    return logits, KVCache(handler.layers, cache.lengths_B + new, dict(cache.facts))


def next_logits(model: PreTrainedModel, cache: KVCache, ids_BN: Tensor) -> Tensor:
    """Logits [B, N, V] after each of the tokens, fed after the cache, which stays as it is. Differentiable."""
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
        prompt: token ids that follow the cached text; at least one.
        temperature: 0 takes the likeliest token; else samples, by `seed`.

    Raises:
        ValueError: on an empty prompt or a cache of several rows.
    """
    if not prompt:
        raise ValueError(
            "prompt: give at least one token; the cache alone does not say what its last token predicts"
        )
    if cache.batch != 1:
        raise ValueError(f"cache of {cache.batch} rows: generate from one row, cache.row(b)")
    device = cache.lengths_B.device
    generator = torch.Generator(device).manual_seed(seed)
    out: list[int] = []
    feed = torch.tensor([prompt], device=device)
    while len(out) < max_new_tokens:
        logits, cache = extend(model, cache, feed)
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
