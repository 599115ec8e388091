"""R-KV (arXiv 2505.24133): slots that are attended to and not said twice.

    score = λ · importance − (1 − λ) · redundancy,    λ = 0.07

Importance: softmax of the last queries over the slots before them, the group's query heads merged by their largest logit,
mean over queries, largest of 7 neighbouring slots. Redundancy: a key's mean cosine with all keys, as a softmax over slots;
for every token the latest of the keys that resemble it (cosine above ½) is not held against that key. The last slots
themselves, the window, are kept.

Made for a cache that is cut again and again while a model thinks; here it cuts once, after the prefill.

Shapes: G KV heads, H query heads, T tokens, W tokens of the window, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.compress.cache import KVCache
from kvcat_nemo.compress.compressor import Compressor, select
from kvcat_nemo.compress.prefill import Prefilled

_BLOCK = 512
_LIKE = 0.5


def importance(q_HWD: Tensor, k_GTD: Tensor, scale: float, pool: int) -> Tensor:
    """Attention of the last W queries to the slots before them, [G, T − W] float32."""
    G, T, W = len(k_GTD), k_GTD.shape[1], q_HWD.shape[1]
    q = q_HWD.float().unflatten(0, (G, -1))
    s = torch.einsum("grwd,gtd->grwt", q, k_GTD[:, : T - W].float()) * scale
    mean = s.amax(1).softmax(-1).mean(1)
    return F.max_pool1d(mean, pool, stride=1, padding=pool // 2)


def redundancy(k_GTD: Tensor) -> Tensor:
    """Mean cosine of each key with the others, the latest likeness of each token left out; softmax, [G, T] float32."""
    k = F.normalize(k_GTD.float(), dim=-1, eps=1e-8)
    G, T = k.shape[:2]
    place = torch.arange(T, device=k.device)
    total = torch.zeros(G, T, device=k.device)
    for first in range(0, T, _BLOCK):  # rows of the T×T matrix, a block at a time
        rows = place[first : first + _BLOCK]
        like = k[:, rows] @ k.transpose(-1, -2)
        like[:, torch.arange(len(rows)), rows] = 0
        # The first slot stands in where nothing is alike, as in the authors' code.
        latest = torch.where(like > _LIKE, place, 0).amax(-1, keepdim=True)
        total += like.scatter(-1, latest, 0).sum(1)
    return (total / T).softmax(-1)


@dataclass
class RKV(Compressor):
    """Attention of the last tokens, less the likeness of a key to other keys; the last tokens are kept."""

    name: ClassVar[str] = "rkv"
    needs: ClassVar[tuple[str, ...]] = ("queries",)
    window: int = 8
    """Last tokens: they ask, and their slots stay."""
    weight: float = 0.07
    """λ: importance against redundancy."""
    pool: int = 7
    """Neighbouring slots that share their importance; odd."""

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window={self.window}: at least one token must ask")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool}: give an odd number of slots, 1 for none")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: give a number in [0, 1]; 0.07 is the paper's")

    @property
    def smallest(self) -> int:
        return self.window + 1

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        scores = []
        for layer, q_1HTD in zip(prefilled.cache.layers, prefilled.queries, strict=True):
            k = layer.read()[0][0]
            score = torch.full(k.shape[:2], torch.inf, device=k.device)
            wanted = importance(q_1HTD[0, :, -self.window :], k, prefilled.scale, self.pool)
            said = redundancy(k)[:, : -self.window]
            score[:, : -self.window] = self.weight * wanted - (1 - self.weight) * said
            scores.append(score[None])
        return select(prefilled, scores, slots)
