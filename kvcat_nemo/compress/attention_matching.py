"""Attention Matching (arXiv 2602.16284): keys are kept, weights and values fitted so that attention stays what it was.

Reference queries are what attention is matched on:

- `repeat`: the context is read again after itself, over the full cache; its queries are those of a reader who goes back
  to what was said.
- `on-policy`: the same, but each layer is compressed as the second reading passes it, and the reading goes on over the
  compressed slots. A layer is then fitted to the queries it will meet, errors of the layers below included.
- `context`: the context's own queries, from the prefill, turned by the rotary embedding to stand after the context.

Shapes: G KV heads, H query heads, R = H/G, C pieces of N reference tokens, Q = R·C·N, T tokens, K kept slots, D, E
head dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcat_nemo.compress.attention import run
from kvcat_nemo.compress.base import Compressor
from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.matching import Matched, Reference, logits, match, reference
from kvcat_nemo.compress.omp import pursue
from kvcat_nemo.compress.prefill import Prefilled

SELECTIONS = ("highest", "omp")
QUERIES = ("on-policy", "repeat", "context")
_PIECE = 1024  # the reference's attention among its own tokens is dense: N×N


@dataclass
class AttentionMatching(Compressor):
    """Keep K keys per layer and KV head; fit a weight and a value to each by least squares.

    Raises:
        ValueError: on a setting out of range.
    """

    name: ClassVar[str] = "attention-matching"

    selection: str = "highest"
    """Keys with the highest root mean square attention, or greedily those that carry the mass together (omp)."""
    queries: str = "on-policy"
    """Reference queries: on-policy, repeat or context."""
    reference_tokens: int = 1024
    """At most so many reference tokens, in pieces spread evenly over a longer context; 0: all."""
    ridge: float = 1e-4
    """How strongly values are drawn to the slots' own, relative to a slot with all attention."""
    weight_ridge: float = 1e-6
    """How strongly weights are drawn to 1."""
    omp_block: int = 4
    """Slots that omp takes at a time."""

    def __post_init__(self):
        for field, value, known in (
            ("selection", self.selection, SELECTIONS),
            ("queries", self.queries, QUERIES),
        ):
            if value not in known:
                raise ValueError(f"{field}={value!r}: choose among {', '.join(known)}")
        if self.reference_tokens < 0 or self.omp_block < 1:
            raise ValueError(
                f"reference_tokens={self.reference_tokens}, omp_block={self.omp_block}: give a number of tokens"
                " (0 for all) and at least 1 slot"
            )
        if not (self.ridge > 0 and self.weight_ridge > 0):
            raise ValueError(
                f"ridge={self.ridge}, weight_ridge={self.weight_ridge}: give numbers above 0; without a ridge values"
                " of single slots grow beyond what half precision holds"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("queries",) if self.queries == "context" else ()

    @torch.no_grad()
    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        if self.queries == "context":
            layers = self._from_context(prefilled, slots)
        else:
            ids_CN = reference_pieces(prefilled.ids_BT[0], self.reference_tokens, prefilled.model)
            reader = _Reader(self, prefilled.cache, slots)
            positions = len(prefilled.ids_BT[0]) + torch.arange(ids_CN.shape[1], device=ids_CN.device)
            run(prefilled.model, ids_CN, positions.expand_as(ids_CN), reader, logits=0)
            layers = reader.layers
        return KVCache(layers, prefilled.cache.lengths_B)

    def compress_layer(self, layer: LayerCache, q_GQD: Tensor, scale: float, slots: int):
        """One layer of one row, from given reference queries.

        Returns:
            the smaller layer, attention over all slots, and attention over the kept ones.
        """
        keys, values = layer.read()
        k, v, q = _wide(keys[0]), _wide(values[0]), _wide(q_GQD)
        target = reference(q, k, v, scale)
        if self.selection == "omp":
            m = (logits(q, k, scale) - target.lse_GQ[..., None]).exp()
            places = pursue(m, slots, self.weight_ridge, self.omp_block)
        else:
            places = target.score_GT.topk(slots, -1).indices
        places = places.sort(-1).values
        kept = layer.take(places[None])
        matched = match(
            q,
            _wide(kept.keys_BGSD[0]),
            _wide(kept.values_BGSE[0]),
            target,
            scale,
            ridge=self.ridge,
            weight_ridge=self.weight_ridge,
        )
        smaller = LayerCache(kept.keys_BGSD, matched.values_GKE[None].to(values.dtype), matched.bias_GK[None])
        return smaller, target, matched

    def _from_context(self, prefilled: Prefilled, slots: int) -> list[LayerCache]:
        layers = []
        T = len(prefilled.ids_BT[0])
        step = -(-T // self.reference_tokens) if self.reference_tokens else 1
        for q_1HTD, layer in zip(prefilled.queries, prefilled.cache.layers, strict=True):
            q_HND = turned(_wide(q_1HTD[0, :, ::step]), T, prefilled.model)
            q_GQD = q_HND.reshape(layer.bias_BGS.shape[1], -1, q_HND.shape[-1])
            layers.append(self.compress_layer(layer, q_GQD, prefilled.scale, slots)[0])
        return layers


class _Reader:
    """Handler of the second reading: compresses a layer from the queries that reach it, then attends."""

    def __init__(self, compressor: AttentionMatching, cache: KVCache, slots: int):
        self.compressor, self.cache, self.slots = compressor, cache, slots
        self.layers: list[LayerCache] = []

    def attend(self, layer: int, q_CHND: Tensor, k_CGND: Tensor, v_CGNE: Tensor, scale: float) -> Tensor:
        C, H, N, D = q_CHND.shape
        G = k_CGND.shape[1]
        q_GQD = q_CHND.reshape(C, G, H // G, N, D).transpose(0, 1).reshape(G, -1, D)
        smaller, target, matched = self.compressor.compress_layer(
            self.cache.layers[layer], q_GQD, scale, self.slots
        )
        self.layers.append(smaller)
        context = matched if self.compressor.queries == "on-policy" else target
        return _joined(context, q_CHND, k_CGND, v_CGNE, scale)


def _joined(context: Matched | Reference, q_CHND, k_CGND, v_CGNE, scale: float) -> Tensor:
    """Attention over the context, which is known already, and causally over the reading's own tokens."""
    C, H, N, D = q_CHND.shape
    G = k_CGND.shape[1]
    q = _wide(q_CHND).reshape(C * G, -1, D)
    k, v = (_wide(x).reshape(C * G, N, -1) for x in (k_CGND, v_CGNE))
    own = logits(q, k, scale).view(C * G, H // G, N, N)
    own = own.masked_fill_(torch.ones(N, N, dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    own_lse = own.logsumexp(-1, keepdim=True)
    out = (own.sub_(own_lse).exp_().view(C * G, -1, N) @ v).view(C, H, N, -1)

    def as_rows(x_GQ):
        return x_GQ.reshape(G, C, H // G, N, -1).transpose(0, 1).reshape(C, H, N, -1)

    share = torch.sigmoid(as_rows(context.lse_GQ[..., None]) - own_lse.view(C, H, N, 1))
    return torch.lerp(out, as_rows(context.output_GQE), share).to(q_CHND.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reference_pieces(ids_T: Tensor, most: int, model: PreTrainedModel) -> Tensor:
    """What is read again, [C, N]: the whole context where that is few enough tokens, else pieces spread over it.

    Raises:
        ValueError: when the context leaves no positions behind it.
    """
    T = len(ids_T)
    room = model.config.max_position_embeddings - T
    if room < 1:
        raise ValueError(
            f"context of {T} tokens: the model has no positions left to read it again; shorten it or set queries=context"
        )
    wanted = min(T, most or T)
    N = min(wanted, room, _PIECE if wanted == T else _PIECE // 4)
    count = -(-wanted // N)
    starts = torch.linspace(0, T - N, count).round().long() if count > 1 else torch.tensor([T - N])
    return ids_T[(starts[:, None] + torch.arange(N)).to(ids_T.device)]


def turned(q_HND: Tensor, by: int, model: PreTrainedModel) -> Tensor:
    """Queries as they would be `by` positions later."""
    angle = by * model.model.rotary_emb.inv_freq.to(q_HND.dtype)
    angle = torch.cat([angle, angle]).to(q_HND.device)
    one, two = q_HND.chunk(2, -1)
    return q_HND * angle.cos() + torch.cat([-two, one], -1) * angle.sin()
