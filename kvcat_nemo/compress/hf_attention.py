"""The seam to Hugging Face models: attention is handed to an object of ours, which owns the cache.

A model runs with no cache and no mask of transformers' own (their meaning changes between versions, and a shortened
cache with their positions leaks future tokens). Each layer's attention calls `handler.attend`, with queries and keys
that carry their rotary embedding at the positions we gave.

Shapes: B rows, N tokens of this call, H query heads, G KV heads, S slots, D and E head dims, M hidden size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.compat import attention, rope_type
from kvcat_nemo.models.families import FAMILIES

NAME = "kvcat_handler"


class Handler(Protocol):
    """Computes the attention of one forward pass."""

    def attend(self, layer: int, q_BHND: Tensor, k_BGND: Tensor, v_BGNE: Tensor, scale: float) -> Tensor:
        """[B, H, N, E] of one layer; the keys and values are those of the call's own tokens."""


# The order is transformers' own: kvpress wraps every registered function and hands `dropout` on by its place.
def _attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, kvcat_handler=None, **unused
):
    if kvcat_handler is None:
        raise RuntimeError("the model was left with kvcat's attention; call it through kvcat_nemo.compress")
    out = kvcat_handler.attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)


def check_model(model: PreTrainedModel) -> None:
    """Refuse models whose attention is not plain causal attention over one KV cache per layer.

    Raises:
        ValueError: names the field of the model's configuration.
    """
    config = model.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={config.model_type!r}: compressors know {', '.join(FAMILIES)} (Llama- and Qwen-style models)"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = (
        FAMILIES[config.model_type].windows == "all" and getattr(config, "sliding_window", None) is not None
    )
    if kinds != {"full_attention"} or sliding or getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"sliding_window={getattr(config, 'sliding_window', None)}: layers with a sliding window forget slots by"
            " themselves; only full attention is supported"
        )
    rope = rope_type(model)
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type={rope!r}: its frequencies change with the length of the text, so the keys of a cache would belong to"
            " another length; compressors need a fixed rope (default, linear, llama3, yarn)"
        )


def run(
    model: PreTrainedModel,
    ids_BN: Tensor,
    positions_BN: Tensor,
    handler: Handler,
    *,
    logits: int | None = None,
) -> Tensor:
    """One forward pass of the model with our attention.

    Args:
        ids_BN: tokens; positions_BN: where in the text each of them stands.
        logits: how many of the last tokens' logits are wanted, None for all.

    Returns:
        logits [B, N, V], or of the last tokens alone; [B, 0, V] with 0.
    """
    with attention(model, NAME):
        hidden = model.model(
            input_ids=ids_BN, position_ids=positions_BN, use_cache=False, kvcat_handler=handler
        ).last_hidden_state
    if logits is not None:
        hidden = hidden[:, hidden.shape[1] - logits :]
    return model.lm_head(hidden)


def causal(q_BHND: Tensor, k_BGND: Tensor, v_BGNE: Tensor, scale: float) -> Tensor:
    """Causal attention of tokens among themselves. Rows padded at the end need no mask: padding comes last."""
    grouped = q_BHND.shape[1] != k_BGND.shape[1]
    return F.scaled_dot_product_attention(
        q_BHND, k_BGND, v_BGNE, is_causal=True, scale=scale, enable_gqa=grouped
    )


def attend_cache(layer: LayerCache, q_BHND: Tensor, k_BGND: Tensor, v_BGNE: Tensor, scale: float) -> Tensor:
    """Attention over a cache's slots, their biases included, and causally over the call's own tokens."""
    keys, values = layer.read()
    B, H, N, _ = q_BHND.shape
    G, S = k_BGND.shape[1], keys.shape[2]
    own = torch.full((N, N), -torch.inf, dtype=torch.float32, device=q_BHND.device).triu(1)
    wide = torch.promote_types(torch.float32, q_BHND.dtype)
    bias = layer.bias_BGS.to(wide)[:, :, None, None, :].expand(B, G, H // G, N, S).reshape(B, H, N, S)
    bias = torch.cat([bias, own.expand(B, H, N, N)], -1).to(q_BHND.dtype)
    k, v = (
        torch.cat([old.to(new.dtype), new], 2).repeat_interleave(H // G, 1)
        for old, new in ((keys, k_BGND), (values, v_BGNE))
    )
    return F.scaled_dot_product_attention(q_BHND, k, v, attn_mask=bias, scale=scale)


class OverCache:
    """Attends over a cache. With `grow`, the call's own tokens join it (`handler.cache` afterwards)."""

    def __init__(self, cache: KVCache, *, grow: bool = False, lengths_B: Tensor | None = None):
        self.cache = cache
        self.grow = grow
        self.lengths_B = lengths_B
        """New tokens of each row where rows are padded at the end; None: all of them."""
        self.layers = list(cache.layers)

    def attend(self, layer: int, q_BHND: Tensor, k_BGND: Tensor, v_BGNE: Tensor, scale: float) -> Tensor:
        out = attend_cache(self.layers[layer], q_BHND, k_BGND, v_BGNE, scale)
        if self.grow:
            B, G, N = k_BGND.shape[:3]
            bias = torch.zeros(B, G, N, device=k_BGND.device)
            if self.lengths_B is not None:
                beyond = torch.arange(N, device=k_BGND.device) >= self.lengths_B[:, None]
                bias = bias.masked_fill(beyond[:, None], -torch.inf)
            self.layers[layer] = self.layers[layer].append(k_BGND, v_BGNE, bias)
        return out
