"""KVSculpt (arXiv 2603.27819): keys that are no token's, moved until attention is what it was.

The slots start as Attention Matching leaves them. Then, in turns, L-BFGS moves keys and weights on the attention error
with the values held, and ridge least squares gives the values anew. The error of a KV head over its reference queries is

    mean ‖o − o*‖² / mean ‖o* − mean o*‖² + mass · mean (log Z − log Z*)²

with o the attention output and Z the softmax' denominator over the slots, * over all slots. The paper has the first term
alone; the second keeps the context's weight against tokens that come later.

With `adaptive`, a pilot run with few iterations shows how hard each layer's heads are, and slots move to the hard ones.

Shapes: L layers, G KV heads, Q reference queries, T slots, K kept slots (of the head that has most), D and E head dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from kvcat_nemo.compress.attention_matching import AttentionMatching, _wide
from kvcat_nemo.compress.attention_matching_fit import Reference, fit_values, fit_weights, logits
from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.prefill import Prefilled
from kvcat_nemo.compress.solvers.lbfgs import minimise

_PILOT = 4
_LEAST = 0.25
_BIAS_LIMIT = 30.0


@dataclass
class Problem:
    """One layer: what attention over few slots should give."""

    q_GQD: Tensor
    target: Reference
    present_GK: Tensor
    scale: float
    mass: float

    @cached_property
    def spread_G(self) -> Tensor:
        """How far outputs lie from their mean, squared: the error of one slot with a fixed value."""
        o = self.target.output_GQE
        return (o - o.mean(1, keepdim=True)).square().sum(-1).mean(-1).clamp(min=1e-20)

    def distance(self, output_GQE: Tensor, lse_GQ: Tensor) -> Tensor:
        """The error of given outputs and denominators, [G]."""
        wrong = (output_GQE - self.target.output_GQE).square().sum(-1).mean(-1)
        return wrong / self.spread_G + self.mass * (lse_GQ - self.target.lse_GQ).square().mean(-1)

    def error(self, k_GKD: Tensor, bias_GK: Tensor, v_GKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each head's error [G] and its gradient to keys and biases."""
        lse, a = self.attend(k_GKD, bias_GK)
        output = a @ v_GKE
        Q, off = a.shape[1], lse - self.target.lse_GQ
        per_query = 2 / (Q * self.spread_G)
        wrong = output - self.target.output_GQE
        slope = (wrong * per_query[:, None, None]) @ v_GKE.transpose(1, 2)
        slope = slope - (a * slope).sum(-1, keepdim=True) + (2 * self.mass / Q) * off[..., None]
        slope = slope.mul_(a)
        return self.distance(output, lse), self.scale * (slope.transpose(1, 2) @ self.q_GQD), slope.sum(1)

    def attend(self, k_GKD: Tensor, bias_GK: Tensor) -> tuple[Tensor, Tensor]:
        """log Z [G, Q] and attention [G, Q, K]."""
        s = logits(self.q_GQD, k_GKD, self.scale) + bias_GK[:, None].masked_fill(
            ~self.present_GK[:, None], -torch.inf
        )
        lse = s.logsumexp(-1)
        return lse, s.sub_(lse[..., None]).exp_()

    def values(self, k_GKD: Tensor, bias_GK: Tensor, old_GKE: Tensor, ridge: float) -> Tensor:
        return fit_values(self.attend(k_GKD, bias_GK)[1], self.target.output_GQE, old_GKE, ridge)


def sculpt(
    problem: Problem,
    k_GKD: Tensor,
    bias_GK: Tensor,
    own_v_GKE: Tensor,
    *,
    rounds: int,
    iterations: int,
    ridge: float,
    key_ridge: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Better keys, biases and values, [G, K, …] each: `rounds` times keys and biases by L-BFGS, then values.

    Args:
        own_v_GKE: the tokens' own values, to which the ridge draws.
        key_ridge: how strongly keys are drawn to where they start.
    """
    G, K, D = k_GKD.shape
    # In units of the keys' size, where moves of keys and of biases are alike in effect.
    unit = k_GKD.square().mean((1, 2)).sqrt().clamp(min=1e-6)[:, None, None]
    x = start = torch.cat([k_GKD / unit, bias_GK[..., None]], -1).flatten(1)
    pull = key_ridge / (K * D)

    def parts(x):
        k, bias = x.view(G, K, D + 1).split([D, 1], -1)
        return k * unit, bias[..., 0].clamp(-_BIAS_LIMIT, _BIAS_LIMIT)

    v_GKE = problem.values(k_GKD, bias_GK, own_v_GKE, ridge)
    for _ in range(rounds):

        def function(x, v=v_GKE):
            k, bias = parts(x)
            error, to_k, to_bias = problem.error(k, bias, v)
            slope = torch.cat([to_k * unit, to_bias[..., None]], -1).flatten(1)
            return error + pull * (x - start).square().sum(-1), slope + 2 * pull * (x - start)

        x, _ = minimise(function, x, iterations=iterations, first_step=0.1)
        k_GKD, bias_GK = parts(x)
        v_GKE = problem.values(k_GKD, bias_GK, own_v_GKE, ridge)
    return k_GKD, bias_GK, v_GKE


@dataclass
class KVSculpt(AttentionMatching):
    """Attention Matching with moved keys, and with more slots for heads that are hard to match."""

    name: ClassVar[str] = "kvsculpt"
    selection: str = "omp"
    """Where keys start, as in attention-matching."""
    queries: str = "mixed"
    """Reference queries, as in attention-matching. Keys that are free overfit to one kind of them."""
    rounds: int = 2
    """Turns of keys and values."""
    iterations: int = 6
    """L-BFGS steps of a turn."""
    key_ridge: float = 1.0
    """How strongly keys are drawn to the tokens' own, per mean squared move in units of the keys' size."""
    mass: float = 1.0
    """Weight of the error of log Z."""
    adaptive: bool = True
    """Move slots between layers and heads after a pilot run; the total stays."""
    exponent: float = 0.5
    """Slots of a head ∝ its pilot error to this power."""

    def __post_init__(self):
        super().__post_init__()
        if self.rounds < 1 or self.iterations < 1:
            raise ValueError(f"rounds={self.rounds}, iterations={self.iterations}: give at least 1 of each")
        if min(self.mass, self.exponent, self.key_ridge) < 0:
            raise ValueError(
                f"mass={self.mass}, exponent={self.exponent}, key_ridge={self.key_ridge}: give numbers of 0 or more"
            )

    @torch.no_grad()
    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        if self.selection == "auto":
            return self.resolved(slots).compress_row(prefilled, slots)
        if not self.adaptive:
            return super().compress_row(prefilled, slots)
        shape = (len(prefilled.cache.layers), prefilled.cache.layers[0].bias_BGS.shape[1])
        pilot = _Allotted(replace(self, rounds=1, iterations=_PILOT), torch.full(shape, slots))
        pilot.compress_row(prefilled, slots)
        counts_LG = allot(torch.stack(pilot.errors_LG), slots, len(prefilled.ids_BT[0]), self.exponent)
        return _Allotted(self, counts_LG).compress_row(prefilled, slots)

    def compress_layer(
        self, layer: LayerCache, q_GQD: Tensor, scale: float, slots: int
    ) -> tuple[LayerCache, Reference]:
        """One layer of one row, from given reference queries: the smaller layer, and attention over all slots."""
        return self.sculpt_layer(layer, q_GQD, scale, torch.full(layer.bias_BGS.shape[1:2], slots))[:2]

    def sculpt_layer(
        self, layer: LayerCache, q_GQD: Tensor, scale: float, counts_G: Tensor
    ) -> tuple[LayerCache, Reference, Tensor]:
        """As `compress_layer`, with slots for each head, and with the error that remains, [G]."""
        keys, values = layer.read()
        k, v, q = _wide(keys[0]), _wide(values[0]), _wide(q_GQD)
        most = int(counts_G.max())
        target, order = self._select(q, k, v, scale, most)
        present = torch.arange(order.shape[-1], device=k.device) < counts_G.to(k.device)[:, None]
        # Text order, padding behind.
        places = order.masked_fill(~present, k.shape[1]).sort(-1).values.clamp(max=k.shape[1] - 1)
        kept = layer.take(places[None], present[None])
        new_k, own_v = _wide(kept.keys_BGSD[0]), _wide(kept.values_BGSE[0])
        problem = Problem(q, target, present, scale, self.mass)
        masses = (logits(q, new_k, scale) - target.lse_GQ[..., None]).exp()
        bias = fit_weights(masses.masked_fill(~present[:, None], 0), self.weight_ridge).log().to(q.dtype)
        new_k, bias, _ = sculpt(
            problem, new_k, bias, own_v,
            rounds=self.rounds, iterations=self.iterations, ridge=self.ridge, key_ridge=self.key_ridge,
        )  # fmt: skip
        # Values are fitted once more, to keys and biases as they will be read.
        new_k, bias = new_k.to(keys.dtype), bias.float()
        wide_k, wide_bias = _wide(new_k), bias.to(q.dtype)
        new_v = problem.values(wide_k, wide_bias, own_v, self.ridge).to(values.dtype)
        error = problem.error(wide_k, wide_bias, _wide(new_v))[0]
        bias = bias.masked_fill(~present, -torch.inf)
        return LayerCache(new_k[None], new_v[None], bias[None]), target, error


class _Allotted(KVSculpt):
    """With slots for each layer's heads; keeps the errors that remain. For one row, whose layers come in turn."""

    def __init__(self, settings: KVSculpt, counts_LG: Tensor):
        super().__init__(**{**settings.settings, "adaptive": False})
        self.counts_LG = counts_LG
        self.errors_LG: list[Tensor] = []

    def compress_layer(
        self, layer: LayerCache, q_GQD: Tensor, scale: float, slots: int
    ) -> tuple[LayerCache, Reference]:
        counts_G = self.counts_LG[len(self.errors_LG)]
        smaller, target, error_G = self.sculpt_layer(layer, q_GQD, scale, counts_G)
        self.errors_LG.append(error_G)
        return smaller, target


def allot(errors_LG: Tensor, slots: int, most: int, exponent: float) -> Tensor:
    """Slots of every head, [L, G]: in proportion to error^exponent, at least a quarter of the even share.

    They add up to L·G·slots, and none exceeds `most`.
    """
    share = errors_LG.double().flatten().cpu().clamp(min=1e-12) ** exponent
    least, total = max(1, math.floor(slots * _LEAST)), slots * len(share)
    # One factor for all heads such that the bounded counts add up: bisection, then whole slots to the largest remainders.
    low, high = 0.0, most / float(share.min())
    for _ in range(100):
        factor = (low + high) / 2
        if float((share * factor).clamp(least, most).sum()) < total:
            low = factor
        else:
            high = factor
    wanted = (share * high).clamp(least, most)
    counts = wanted.floor().long()
    for head in (wanted - counts).sort(descending=True, stable=True).indices.tolist():
        counts[head] += int(counts.sum() < total and counts[head] < most)
    return counts.view(errors_LG.shape)
