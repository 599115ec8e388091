"""Two transformers that count letters, one whose cache can be made small and one whose cannot.

The task: after every token, the frequency of each letter so far. Both models attend evenly (their queries are 0, so keys
are without effect) and sum one-hot letters. n tokens are compressed to r slots, k more follow.

- naive: attention's output is the answer. Over r plain slots it divides by r + k where n + k is meant. For suffixes of k
  equal letters, aaa… and bbb…, the right answers differ by k/(n+k) in a letter, the model's by k/(r+k), whatever the slots
  hold. So one of the two is off by at least half the difference, k(n−r) / (2(n+k)(r+k)); the best slots attain that.
- structured: values have room for a position code. The one slot holds the letters' sum and the code of n; what follows
  attention knows its own position j and finds from the code how many slots there were, so it can divide by j instead.
- with a bias of log n, one slot has the weight of n, and the naive model is exact too.

Shapes: m letters, N suffix tokens.
"""

from __future__ import annotations

import math

import pytest
import torch

from kvcat_nemo.compress import KVCache, LayerCache, stack_rows
from kvcat_nemo.compress.attention_matching import AttentionMatching
from kvcat_nemo.compress.hf_attention import OverCache, attend_cache
from kvcat_nemo.compress.solvers.lbfgs import minimise

M = 5
D = 4


def one_hot(letters) -> torch.Tensor:
    return torch.eye(M, dtype=torch.float64)[letters]


def slots(values_SE: torch.Tensor, bias_S: torch.Tensor | None = None, *, seed: int = 0) -> LayerCache:
    """A layer of one row and head with these values, and keys that must not matter."""
    S = len(values_SE)
    keys = torch.randn(1, 1, S, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bias = torch.zeros(S, dtype=torch.float64) if bias_S is None else bias_S
    return LayerCache(keys, values_SE[None, None], bias[None, None])


def attend(layer: LayerCache, values_NE: torch.Tensor) -> torch.Tensor:
    """Attention output [N, E] of the suffix' tokens, through the project's attention over a cache."""
    N = len(values_NE)
    q = torch.zeros(1, 1, N, D, dtype=torch.float64)
    return attend_cache(layer, q, torch.ones_like(q), values_NE[None, None], 0.5)[0, 0]


def frequencies(letters) -> torch.Tensor:
    """The task itself, [T, m]."""
    counts = one_hot(letters).cumsum(0)
    return counts / torch.arange(1, len(letters) + 1, dtype=torch.float64)[:, None]


def example(seed, n, k):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(M, (size,), generator=generator) for size in (n, k)]


# The structured model: values are [letter (m), position code (2)].


def code(position) -> torch.Tensor:
    """Distinct directions for distinct positions, so that a code divided by a count still tells the position."""
    angle = torch.as_tensor(position, dtype=torch.float64) * (math.pi / 2 / 64)
    return torch.stack([angle.cos(), angle.sin()], -1)


def structured_values(letters) -> torch.Tensor:
    return torch.cat([one_hot(letters), torch.zeros(len(letters), 2, dtype=torch.float64)], 1)


def structured_answer(output_NE: torch.Tensor, first: int) -> torch.Tensor:
    """What follows attention, token by token: it sees its own position and attention's output, nothing else."""
    answers = []
    for s, out in enumerate(output_NE):
        position = first + s
        letters, found = out[:M], out[M:]
        if float(found.norm()) < 1e-12:
            answers.append(letters)  # no slot stands for several tokens
            continue
        n = int((code(torch.arange(64)) @ found).argmax())
        answers.append(letters * (position - n + 1) / position)
    return torch.stack(answers)


@pytest.mark.parametrize("seed", range(12))
def test_structured_construction_survives_one_slot(seed, tmp_path):
    n, k = 2 + 3 * seed, 1 + (5 * seed) % 13
    prefix, suffix = example(seed, n, k)
    expected = frequencies(torch.cat([prefix, suffix]))
    everything = structured_values(torch.cat([prefix, suffix]))
    # Uncompressed it counts letters.
    dense = attend(slots(everything[:1]), everything[1:])
    torch.testing.assert_close(structured_answer(dense, 2), expected[1:], rtol=0, atol=1e-12)
    # One slot for the whole prefix.
    summary = torch.cat([one_hot(prefix).sum(0), code(n)])[None]
    one = KVCache([slots(summary, seed=seed)], torch.tensor([n]))
    assert one.slots == 1
    one.save(tmp_path / "one.safetensors")
    one = KVCache.load(tmp_path / "one.safetensors")
    got = structured_answer(attend(one.layers[0], structured_values(suffix)), n + 1)
    torch.testing.assert_close(got, expected[n:], rtol=0, atol=1e-12)
    # Token by token, the cache growing, in a batch with a longer cache.
    wide = KVCache([slots(everything[:n], seed=seed)], torch.tensor([n]))
    handler = OverCache(stack_rows([one, wide]), grow=True)
    q = torch.zeros(2, 1, 1, D, dtype=torch.float64)
    for s, value in enumerate(structured_values(suffix)):
        out = handler.attend(0, q, torch.ones_like(q), value.expand(2, 1, 1, -1), 0.5)
        for b in range(2):
            answer = structured_answer(out[b, 0], n + 1 + s)
            torch.testing.assert_close(answer[0], expected[n + s], rtol=0, atol=1e-12)


def worst_case(n, r, k):
    return k * (n - r) / (2 * (n + k) * (r + k))


def naive_errors(values_rE, prefix, k):
    """Largest wrong frequency after k equal letters, for each of the letters, [m]."""
    errors = []
    for letter in range(M):
        suffix = torch.full((k,), letter)
        out = attend(slots(values_rE), one_hot(suffix))[-1]
        errors.append((out - frequencies(torch.cat([prefix, suffix]))[-1]).abs().max())
    return torch.stack(errors)


@pytest.mark.parametrize("n, r, k", [(10, 1, 1), (24, 1, 9), (24, 6, 3), (39, 3, 20), (7, 6, 2)])
def test_naive_construction_fails_by_as_much_as_the_bound_and_no_more_than_it_at_best(n, r, k):
    prefix, _ = example(n + r, n, 1)
    bound = worst_case(n, r, k)
    assert bound > 1e-3
    # The best slots: their sum is off by the same for every letter that may come.
    best = (r + k) / (n + k) * one_hot(prefix).sum(0) - 0.5 * k * (n - r) / (n + k)
    errors = naive_errors(best.expand(r, -1) / r, prefix, k)
    torch.testing.assert_close(errors, torch.full_like(errors, bound), rtol=0, atol=1e-12)
    # For any suffix of k letters these slots do no worse.
    for seed in range(20):
        _, suffix = example(seed, 1, k)
        out = attend(slots(best.expand(r, -1) / r), one_hot(suffix))[-1]
        wrong = (out - frequencies(torch.cat([prefix, suffix]))[-1]).abs().max()
        assert float(wrong) <= bound + 1e-12
    # What one would keep, and slots an optimiser looks for, do worse.
    kept, mean = one_hot(prefix[-r:]), one_hot(prefix).mean(0).expand(r, -1)
    summed = one_hot(prefix).sum(0).expand(r, -1) / r
    for values in (kept, mean, summed, kept + 0.3):
        assert float(naive_errors(values, prefix, k).max()) >= bound - 1e-12

    def smooth_worst(x_PN):
        x = x_PN.detach().requires_grad_(True)
        off = torch.stack(
            [
                attend(slots(x.view(r, M)), one_hot(torch.full((k,), letter)))[-1]
                - frequencies(torch.cat([prefix, torch.full((k,), letter)]))[-1]
                for letter in range(M)
            ]
        )
        loss = (off.abs() / bound).pow(20).mean().pow(1 / 20)[None]
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), gradient

    found, _ = minimise(smooth_worst, kept.reshape(1, -1), iterations=15)
    worst = float(naive_errors(found.view(r, M), prefix, k).max())
    assert bound - 1e-12 <= worst < float(naive_errors(kept, prefix, k).max())


@pytest.mark.parametrize("n, k", [(2, 1), (10, 7), (39, 20)])
def test_with_a_bias_of_log_n_one_slot_is_exact_for_the_naive_model_too(n, k):
    prefix, suffix = example(n, n, k)
    expected = frequencies(torch.cat([prefix, suffix]))[n:]
    mean = one_hot(prefix).mean(0)[None]
    weight = torch.tensor([float(n)], dtype=torch.float64).log()
    torch.testing.assert_close(attend(slots(mean, weight), one_hot(suffix)), expected, rtol=0, atol=1e-12)
    # The float32 biases that caches of real models hold cost a rounding.
    rounded = attend(slots(mean, weight.float()), one_hot(suffix))
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-6)
    # A weight that is off by a tenth shows.
    assert float((attend(slots(mean, weight + 0.1), one_hot(suffix)) - expected).abs().max()) > 1e-3


def test_attention_matching_finds_the_weight():
    """Its weights go up to e³: 16 tokens fit into one slot, and the naive model goes on nearly as it was."""
    n, k = 16, 6
    prefix, suffix = example(1, n, k)
    queries = torch.zeros(1, 8, D, dtype=torch.float64)
    one, *_ = AttentionMatching().compress_layer(slots(one_hot(prefix)), queries, 0.5, 1)
    assert one.slots_BG.tolist() == [[1]]
    assert float(one.bias_BGS) == pytest.approx(math.log(n), abs=1e-3)
    off = (attend(one, one_hot(suffix)) - frequencies(torch.cat([prefix, suffix]))[n:]).abs().max()
    assert float(off) < 1e-3 < worst_case(n, 1, k) / 10
