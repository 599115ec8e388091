"""Attention Matching (arXiv 2602.16284): keys are kept, weights and values fitted so that attention stays what it was.

Reference queries are what attention is matched on:

- `context`: the context's own queries, from the prefill, turned by the rotary embedding to stand behind the context.
  Without the turn a query looks at slots that come after it, at distances that never occur again.
- `repeat`: the context is read again after itself, over the full cache; its queries are those of a reader who goes back
  to what was said.
- `on-policy`: the same, but each layer is compressed as the second reading passes it, and the reading goes on over the
  compressed slots. A layer is then fitted to the queries it will meet, errors of the layers below included.
- `mixed`: `on-policy` and `context` together; a few pieces of the context, read again, are then enough.

Shapes: G KV heads, H query heads, R = H/G, C pieces of N tokens that are read again, Q reference queries of a KV head,
T tokens, K kept slots, D and E head dims.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcat_nemo.compress.attention_matching_fit import Reference, attend, logits, match, reference, scores
from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.context_limit import position_limit
from kvcat_nemo.compress.hf_attention import run
from kvcat_nemo.compress.prefill import Prefilled
from kvcat_nemo.compress.rotation import rotated as turned
from kvcat_nemo.compress.solvers.matching_pursuit import pursue

SELECTIONS = ("auto", "highest", "omp")
QUERIES = ("mixed", "on-policy", "repeat", "context")
_SPARE, _STEPS, _JUDGES = 128, 1, 512  # of omp; docs/LOG.md has what they cost and lose
_FEW = 128  # slots
_PIECE = 128
_WHOLE = 1024  # the second reading's attention among its own tokens is dense: N×N


@dataclass
class AttentionMatching(Compressor):
    """Keep K keys per layer and KV head; fit a weight and a value to each by least squares.

    Raises:
        ValueError: on a setting out of range.
    """

    name: ClassVar[str] = "attention-matching"

    selection: str = "auto"
    """Keys with the highest root mean square attention (highest), or greedily those that carry the mass together (omp).

    auto: omp; above 128 slots, where omp is no better, the highest keys and half of the reference tokens.
    """
    queries: str = "mixed"
    """Reference queries: mixed, on-policy, repeat or context."""
    reading_tokens: int = 384
    """So many tokens are read again, in pieces of 128 spread evenly over a longer context; 0: all, in one."""
    reference_tokens: int = 1024
    """Of the reading and of the context, at most so many tokens' queries each are matched, evenly spaced; 0: all."""
    ridge: float = 1e-5
    """How strongly values are drawn to the slots' own, relative to a slot that has all attention."""
    weight_ridge: float = 1e-6
    """How strongly weights are drawn to 1."""
    omp_block: int = 0
    """Slots that omp takes at a time; 0: a sixteenth of them, above 128 slots an eighth."""

    def __post_init__(self):
        for field, value, known in (
            ("selection", self.selection, SELECTIONS),
            ("queries", self.queries, QUERIES),
        ):
            if value not in known:
                raise ValueError(f"{field}={value!r}: choose among {', '.join(known)}")
        for field, zero in (
            ("reading_tokens", "all"),
            ("reference_tokens", "all"),
            ("omp_block", "a sixteenth"),
        ):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}={getattr(self, field)}: give a number, or 0 for {zero}")
        for field in ("ridge", "weight_ridge"):
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"{field}={getattr(self, field)}: give a number above 0, such as 1e-5; without a ridge values of"
                    " single slots grow beyond what half precision holds"
                )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("queries",) if self.queries in ("context", "mixed") else ()

    def resolved(self, slots: int) -> Self:
        """The same with `auto` decided for a number of slots."""
        if self.selection != "auto":
            return self
        if slots <= _FEW:
            return replace(self, selection="omp")
        return replace(self, selection="highest", reference_tokens=-(-self.reference_tokens // 2))

    @torch.no_grad()
    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        fitter = _Fitter(self.resolved(slots), prefilled, slots)
        if self.queries == "context":
            layers = [fitter.fit(layer)[0] for layer in range(len(prefilled.cache.layers))]
        else:
            ids_CN = pieces_to_read(prefilled.ids_BT[0], self.reading_tokens, prefilled.model)
            positions = len(prefilled.ids_BT[0]) + torch.arange(ids_CN.shape[1], device=ids_CN.device)
            run(prefilled.model, ids_CN, positions.expand_as(ids_CN), fitter, logits=0)
            layers = fitter.layers
        return KVCache(layers, prefilled.cache.lengths_B)

    def compress_layer(
        self, layer: LayerCache, q_GQD: Tensor, scale: float, slots: int
    ) -> tuple[LayerCache, Reference]:
        """One layer of one row, from given reference queries: the smaller layer, and attention over all slots."""
        if self.selection == "auto":
            return self.resolved(slots).compress_layer(layer, q_GQD, scale, slots)
        keys, values = layer.read()
        k, v, q = _wide(keys[0]), _wide(values[0]), _wide(q_GQD)
        target, places = self._select(q, k, v, scale, slots)
        kept = layer.take(places.sort(-1).values[None])
        beta, fitted = match(
            q,
            _wide(kept.keys_BGSD[0]),
            _wide(kept.values_BGSE[0]),
            target,
            scale,
            ridge=self.ridge,
            weight_ridge=self.weight_ridge,
        )
        return LayerCache(kept.keys_BGSD, fitted[None].to(values.dtype), beta[None]), target

    def _select(
        self, q_GQD: Tensor, k_GTD: Tensor, v_GTE: Tensor, scale: float, slots: int
    ) -> tuple[Reference, Tensor]:
        """Attention over all slots, and the places of those to keep, best first, [G, slots]."""
        if self.selection == "highest":
            target = reference(q_GQD, k_GTD, v_GTE, scale)
            return target, target.score_GT.topk(slots, -1).indices
        # Of the keys with the highest scores alone: that found the same slots as all, for a fifth of the time.
        most = min(k_GTD.shape[1], slots + min(3 * slots, _SPARE))
        judges = q_GQD[:, :: max(1, q_GQD.shape[1] // _JUDGES)]
        candidates = scores(judges, k_GTD, scale).topk(most, -1).indices
        target = reference(q_GQD, k_GTD, v_GTE, scale, candidates)
        block = self.omp_block or -(-slots // (16 if slots <= 128 else 8))
        taken = pursue(target.masses_GQK, slots, self.weight_ridge, block, _STEPS)
        return target, candidates.gather(1, taken)


class _Fitter:
    """Compresses the layers of a row in turn. As the handler of a second reading, from the queries that reach them."""

    def __init__(self, compressor: AttentionMatching, prefilled: Prefilled, slots: int):
        self.compressor, self.prefilled, self.slots = compressor, prefilled, slots
        self.layers: list[LayerCache] = []

    def fit(self, number: int, q_CHND: Tensor | None = None) -> tuple[LayerCache, Reference]:
        """One layer, from the queries of a reading, if given, and from the context's own, if recorded."""
        layer = self.prefilled.cache.layers[number]
        T = len(self.prefilled.ids_BT[0])
        parts = []
        if q_CHND is not None:
            parts.append(q_CHND[:, :, :: self._step(q_CHND.shape[0] * q_CHND.shape[2])])
        if "queries" in self.compressor.needs:
            q_1HTD = _wide(self.prefilled.queries[number][:, :, :: self._step(T)])
            parts.append(turned(q_1HTD, T, self.prefilled.model))
        q_GQD = torch.cat([by_group(q, layer.bias_BGS.shape[1]) for q in parts], 1)
        return self.compressor.compress_layer(layer, q_GQD, self.prefilled.scale, self.slots)

    def _step(self, tokens: int) -> int:
        most = self.compressor.reference_tokens
        return -(-tokens // most) if most else 1

    def attend(self, layer: int, q_CHND: Tensor, k_CGND: Tensor, v_CGNE: Tensor, scale: float) -> Tensor:
        smaller, target = self.fit(layer, q_CHND)
        self.layers.append(smaller)
        G = k_CGND.shape[1]
        seen = self.prefilled.cache.layers[layer] if self.compressor.queries == "repeat" else smaller
        keys, values = seen.read()
        q_GQD = _wide(by_group(q_CHND, G))
        if seen is not smaller and q_GQD.shape[1] == target.lse_GQ.shape[1]:
            lse, out = target.lse_GQ, target.output_GQE  # every query was matched: this is known
        else:
            lse, out = attend(q_GQD, _wide(keys[0]), _wide(values[0]), seen.bias_BGS[0], scale)
        return _joined(lse, out, q_CHND, k_CGND, v_CGNE, scale)


def by_group(q_CHND: Tensor, G: int) -> Tensor:
    """Queries of a KV head: those of its query heads, one after another, [G, C·R·N, D]."""
    C, H, N, D = q_CHND.shape
    return q_CHND.reshape(C, G, H // G, N, D).transpose(0, 1).reshape(G, -1, D)


def _joined(lse_GQ, output_GQE, q_CHND, k_CGND, v_CGNE, scale: float) -> Tensor:
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

    share = torch.sigmoid(as_rows(lse_GQ[..., None]) - own_lse.view(C, H, N, 1))
    return torch.lerp(out, as_rows(output_GQE), share).to(q_CHND.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def pieces_to_read(ids_T: Tensor, most: int, model: PreTrainedModel) -> Tensor:
    """What is read again, [C, N]: the whole context where that is few enough tokens, else pieces spread over it.

    Raises:
        ValueError: when the context leaves no positions behind it.
    """
    T = len(ids_T)
    room = position_limit(model.config) - T
    if room < 1:
        raise ValueError(
            f"context of {T} tokens: the model has no positions left to read it again; shorten it or set queries=context"
        )
    wanted = min(T, most or T)
    N = min(wanted, room, _WHOLE if wanted == T else _PIECE)
    count = -(-wanted // N)
    starts = torch.linspace(0, T - N, count).round().long() if count > 1 else torch.tensor([T - N])
    return ids_T[(starts[:, None] + torch.arange(N)).to(ids_T.device)]
