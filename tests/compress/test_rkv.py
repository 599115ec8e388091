"""R-KV's two terms against loops, and what it keeps."""

from __future__ import annotations

import math

import pytest
import torch

from kvcat_nemo.compress import Budget, make, prefill
from kvcat_nemo.compress import rkv as module
from tests.support.hf_models import small_model, tokens


def loop_importance(q, k, scale, pool):
    """q [H, W, D], k [T, D] of one KV head; float64, one number at a time."""
    H, W, _ = q.shape
    seen = len(k) - W
    mean = [0.0] * seen
    for w in range(W):
        logits = [max(float(q[h, w] @ k[t]) * scale for h in range(H)) for t in range(seen)]
        top = max(logits)
        total = sum(math.exp(x - top) for x in logits)
        for t in range(seen):
            mean[t] += math.exp(logits[t] - top) / total / W
    half = pool // 2
    return [max(mean[max(0, t - half) : t + half + 1]) for t in range(seen)]


def loop_redundancy(k):
    T = len(k)
    cosine = [
        [0.0 if i == j else float(k[i] @ k[j] / (k[i].norm() * k[j].norm())) for j in range(T)]
        for i in range(T)
    ]
    for i in range(T):
        alike = [j for j in range(T) if cosine[i][j] > 0.5]
        cosine[i][alike[-1] if alike else 0] = 0.0
    mean = torch.tensor([sum(cosine[i][j] for i in range(T)) / T for j in range(T)], dtype=torch.float64)
    return mean.softmax(-1)


def test_terms_are_those_of_the_loops(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    torch.manual_seed(0)
    q = torch.randn(4, 3, 8, dtype=torch.float64)
    k = torch.randn(2, 37, 8, dtype=torch.float64) + 0.8
    assert (
        0.2
        < float(
            (
                torch.nn.functional.normalize(k[0], dim=-1) @ torch.nn.functional.normalize(k[0], dim=-1).T
                > 0.5
            )
            .double()
            .mean()
        )
        < 0.8
    )
    got = module.importance(q, k, 0.3, 7)
    said = module.redundancy(k)
    for g in range(2):
        wanted = loop_importance(q[2 * g : 2 * g + 2], k[g], 0.3, 7)
        torch.testing.assert_close(
            got[g].double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-7
        )
        torch.testing.assert_close(said[g].double(), loop_redundancy(k[g]), rtol=1e-4, atol=1e-8)


def test_repeated_keys_go_first_and_the_window_stays():
    model = small_model()
    prefilled = prefill(model, [tokens(60)], needs=("queries",))
    for (
        layer
    ) in prefilled.cache.layers:  # slots 10 to 29 say the same; without importance they are the first to go
        layer.keys_BGSD[:, :, 10:30] = layer.keys_BGSD[:, :, 10:11]
    kept = make("rkv:weight=0").compress(prefilled, Budget(tokens=40))
    for got, full in zip(kept.layers, prefilled.cache.layers, strict=True):
        assert torch.equal(got.keys_BGSD[:, :, -8:], full.keys_BGSD[:, :, -8:])
        for g in range(2):
            copies = (got.keys_BGSD[0, g] == full.keys_BGSD[0, g, 10]).all(-1).sum()
            assert 0 <= int(copies) <= 3
    assert kept.slots == 40


def test_refusals():
    prefilled = prefill(small_model(), [tokens(60)], needs=("queries",))
    with pytest.raises(ValueError, match="rkv: 8 slots .* it needs 9"):
        make("rkv").compress(prefilled, Budget(tokens=8))
    for setting in ("pool=2", "window=0", "weight=2"):
        with pytest.raises(ValueError, match=setting):
            make(f"rkv:{setting}")
