"""Attention Matching against dense float64 oracles written here, on random layers and small models."""

from __future__ import annotations

import math

import pytest
import torch

from kvcat_nemo.compress import Budget, LayerCache, make, next_logits, prefill
from kvcat_nemo.compress.attention_matching import AttentionMatching, pieces_to_read, turned
from kvcat_nemo.compress.attention_matching_fit import (
    HIGH,
    LOW,
    attend,
    fit_values,
    fit_weights,
    match,
    reference,
    scores,
)
from kvcat_nemo.compress.solvers.bounded_least_squares import bounded_least_squares
from kvcat_nemo.compress.solvers.matching_pursuit import pursue
from tests.support.hf_models import small_model, tokens

SCALE = 0.35


def layer(G=2, R=3, N=40, T=30, D=8, E=6, seed=0, dtype=torch.float64):
    """Random slots of one layer, and the queries of G·R heads."""
    torch.manual_seed(seed)
    k, v = torch.randn(G, T, D, dtype=dtype) * 2, torch.randn(G, T, E, dtype=dtype)
    return torch.randn(G, R * N, D, dtype=dtype) * 2, k, v


def dense(q, k, v):
    """Per head, with plain loops: attention and its output."""
    a = torch.stack([torch.softmax(SCALE * q[g] @ k[g].T, -1) for g in range(len(q))])
    return a, torch.stack([a[g] @ v[g] for g in range(len(q))])


def pick(x, places):
    return torch.stack([x[g, places[g]] for g in range(len(x))])


def kkt(H, c, b, low, high):
    """Largest violation of the conditions that make b the minimum of ½bᵀHb − cᵀb within the bounds."""
    gradient = H @ b - c
    inside = (b > low + 1e-9) & (b < high - 1e-9)
    wrong = torch.where(inside, gradient.abs(), 0)
    wrong = torch.where(b <= low + 1e-9, (-gradient).clamp_min(0), wrong)
    wrong = torch.where(b >= high - 1e-9, gradient.clamp_min(0), wrong)
    assert bool(((b >= low) & (b <= high)).all())
    return float(wrong.max())


def test_scores_are_the_root_mean_square_of_attention_over_the_groups_queries():
    q, k, v = layer(N=400)  # several blocks of queries
    a, y = dense(q, k, v)
    got = reference(q, k, v, SCALE)
    torch.testing.assert_close(got.score_GT, a.square().mean(1).sqrt(), rtol=0, atol=1e-14)
    torch.testing.assert_close(scores(q, k, SCALE), got.score_GT)
    places = torch.tensor([[3, 17, 5], [0, 29, 11]])
    torch.testing.assert_close(
        reference(q, k, v, SCALE, places).masses_GQK,
        torch.stack([a[g][:, places[g]] for g in range(2)]),
        rtol=0,
        atol=1e-14,
    )
    torch.testing.assert_close(got.output_GQE, y, rtol=0, atol=1e-13)
    torch.testing.assert_close(got.lse_GQ, torch.logsumexp(SCALE * q @ k.transpose(1, 2), -1))


@pytest.mark.parametrize("K, low, high", [(1, LOW, HIGH), (7, LOW, HIGH), (25, 0.5, 2.0), (40, 0.0, 1.0)])
def test_bounded_least_squares_meets_the_optimality_conditions(K, low, high):
    torch.manual_seed(K)
    M = torch.randn(3, 50, K, dtype=torch.float64) + torch.randn(3, 50, 1, dtype=torch.float64)
    true = low + (high - low) * (1.5 * torch.rand(3, K, 1, dtype=torch.float64) - 0.25)  # half of it outside
    y = (M @ true)[..., 0] + torch.randn(3, 50, dtype=torch.float64)
    H = M.transpose(1, 2) @ M + 1e-6 * torch.eye(K, dtype=torch.float64)
    c = (M.transpose(1, 2) @ y[..., None])[..., 0]
    b = bounded_least_squares(H, c, low, high)
    for g in range(3):
        assert kkt(H[g], c[g], b[g], low, high) < 1e-7 * float(c[g].abs().max())
    if K > 1:
        assert ((b == low) | (b == high)).any() and ((b > low) & (b < high)).any()  # both kinds were there


@pytest.mark.parametrize("K", [1, 5, 20])
def test_weights_are_the_bounded_minimum_of_the_mass_error(K):
    q, k, v = layer()
    a, _ = dense(q, k, v)
    places = a.square().mean(1).topk(K, -1).indices
    M = torch.stack([a[g][:, places[g]] for g in range(2)])
    ridge, Q = 1e-6, M.shape[1]
    b = fit_weights(M, ridge)
    for g in range(2):
        H = M[g].T @ M[g] / Q + ridge * torch.eye(K, dtype=torch.float64)
        c = M[g].T @ torch.ones(Q, dtype=torch.float64) / Q + ridge
        assert kkt(H, c, b[g], LOW, HIGH) < 3e-6  # of 1: the jitter that float32 needs


def test_weights_agree_with_scipy():
    scipy = pytest.importorskip("scipy.optimize", reason="scipy comes with the training environment alone")
    q, k, v = layer()
    a, _ = dense(q, k, v)
    M = a[:, :, :12]
    b = fit_weights(M, 1e-9)
    for g in range(2):
        expected = scipy.lsq_linear(M[g].numpy(), torch.ones(len(M[g])).numpy(), (LOW, HIGH), tol=1e-14).x
        torch.testing.assert_close(b[g], torch.from_numpy(expected), rtol=2e-3, atol=2e-3)


def test_values_are_ridge_least_squares_towards_the_old_ones():
    torch.manual_seed(1)
    x = torch.softmax(torch.randn(2, 60, 9, dtype=torch.float64) * 3, -1)
    y, old = torch.randn(2, 60, 5, dtype=torch.float64), torch.randn(2, 9, 5, dtype=torch.float64)
    for ridge in (1e-5, 1e-2, 10.0):
        got = fit_values(x, y, old, ridge)
        for g in range(2):
            # The same problem as plain least squares with the ridge as rows of its own.
            pull = math.sqrt(60 * ridge) * torch.eye(9, dtype=torch.float64)
            expected = torch.linalg.lstsq(torch.cat([x[g], pull]), torch.cat([y[g], pull @ old[g]])).solution
            torch.testing.assert_close(got[g], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fit_values(x, y, old, 1e9), old, rtol=0, atol=1e-6)


def naive_pursuit(m, slots, ridge, block):
    """One head, from the definition: residuals over queries, no Gram matrix. A ridge row per slot."""
    taken, b = [], torch.zeros(0, dtype=m.dtype)
    while len(taken) < slots:
        residual = 1 - m[:, taken] @ b
        score = m.T @ residual
        score[taken] = -torch.inf
        taken += score.topk(min(block, slots - len(taken))).indices.tolist()
        M = m[:, taken]
        H = M.T @ M / len(m)
        H = H + torch.diag(1e-6 * H.diagonal() + ridge)
        c = M.sum(0) / len(m) + ridge
        b = torch.ones(len(taken), dtype=m.dtype).clamp(LOW, HIGH)
        for _ in range(5_000):  # plain projected gradient
            step = (b - (H @ b - c) / torch.linalg.matrix_norm(H, 2)).clamp(LOW, HIGH)
            done = torch.equal(step, b)
            b = step
            if done:
                break
    return taken


@pytest.mark.parametrize("block", [1, 3])
def test_pursuit_takes_the_slots_that_a_naive_loop_takes(block):
    q, k, v = layer(T=14, N=15)
    a, _ = dense(q, k, v)
    got = pursue(a, 5, 1e-3, block)
    for g in range(2):
        assert got[g].tolist() == naive_pursuit(a[g], 5, 1e-3, block)


def test_pursuit_covers_the_mass_better_than_the_highest_keys():
    q, k, v = layer(T=60, N=60)
    a, _ = dense(q, k, v)

    def missing(places):
        M = torch.stack([a[g][:, places[g]] for g in range(2)])
        return ((M @ fit_weights(M, 1e-9)[..., None])[..., 0] - 1).square().mean()

    assert missing(pursue(a, 8, 1e-9)) < 0.95 * missing(a.square().mean(1).topk(8, -1).indices)


def test_copies_of_a_slot_become_one_slot_of_weight_log_n():
    q, k, v = layer(T=4)
    copies = torch.tensor([1, 5, 2, 9])
    index = torch.arange(4).repeat_interleave(copies)
    target = reference(q, k[:, index], v[:, index], SCALE)
    beta, _ = match(q, k, v, target, SCALE, ridge=1e-4, weight_ridge=1e-14)
    torch.testing.assert_close(beta.double(), copies.double().log().expand(2, 4), rtol=0, atol=2e-5)  # jitter
    # Values equal, only weights to be found: without the jitter of float32 Gram matrices this is exact.
    M = (SCALE * q @ k.transpose(1, 2) - target.lse_GQ[..., None]).exp()
    H, c = M.transpose(1, 2) @ M, M.sum(1)
    exact = bounded_least_squares(H, c, LOW, HIGH, tolerance=1e-15)
    torch.testing.assert_close(exact, copies.double().expand(2, 4), rtol=0, atol=1e-10)
    x = torch.softmax(SCALE * q @ k.transpose(1, 2) + exact.log()[:, None], -1)
    torch.testing.assert_close(x @ v, target.output_GQE, rtol=0, atol=1e-10)


def test_copies_of_one_slot_are_matched_exactly_whatever_their_number():
    q, k, v = layer(T=1)
    for n in (2, 300):
        target = reference(q, k.expand(-1, n, -1), v.expand(-1, n, -1), SCALE)
        beta, values = match(q, k, v, target, SCALE, ridge=1e-4, weight_ridge=1e-12)
        _, out = attend(q, k, values, beta, SCALE)
        torch.testing.assert_close(out, target.output_GQE, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            beta.exp().double(), torch.full((2, 1), min(n, HIGH)).double(), rtol=1e-4, atol=0
        )


def test_a_single_slot_takes_the_mean_output():
    q, k, v = layer()
    target = reference(q, k, v, SCALE)
    _, values = match(q, k[:, :1], v[:, :1], target, SCALE, ridge=1e-9, weight_ridge=1e-9)
    torch.testing.assert_close(values[:, 0], target.output_GQE.mean(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("selection", ["highest", "omp", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_keys_and_fewer_queries_than_slots_stay_finite(selection, dtype):
    compressor = AttentionMatching(selection=selection)
    q, k, v = (x.to(dtype) for x in layer(R=1, N=4, T=50, D=64, E=64))
    for keys in (k, k[:, :1].expand(-1, 50, -1).contiguous(), torch.zeros_like(k), 30 * k):
        full = LayerCache(keys[None], v[None], torch.zeros(1, 2, 50))
        got, target = compressor.compress_layer(full, q, SCALE, 20)
        _, out = attend(
            q.float(), got.keys_BGSD[0].float(), got.values_BGSE[0].float(), got.bias_BGS[0], SCALE
        )
        assert got.keys_BGSD.dtype == got.values_BGSE.dtype == dtype and got.bias_BGS.dtype == torch.float32
        assert got.bias_BGS.abs().max() <= 3 + 1e-5
        assert got.values_BGSE.float().abs().max() < 50
        error = (out - target.output_GQE).square().mean() / target.output_GQE.square().mean()
        assert error < 0.05


def test_mixed_queries_are_those_of_the_reading_and_the_contexts_own():
    model = small_model(dtype=torch.float64)
    prefilled = prefill(model, [tokens(40)], needs=("queries",))
    asked = []

    class Listening(AttentionMatching):
        def compress_layer(self, layer, q_GQD, scale, slots):
            asked.append(q_GQD)
            return super().compress_layer(layer, q_GQD, scale, slots)

    for most, each in ((20, 20), (0, 40), (3, 3)):
        asked.clear()
        Listening(queries="mixed", reference_tokens=most).compress(prefilled, Budget(tokens=6))
        assert [q.shape for q in asked] == [(2, 2 * 2 * each, 16)] * 3  # two kinds, two query heads
        own = turned(prefilled.queries[2][0, 2:, :: -(-40 // each)], 40, model).reshape(-1, 16)
        torch.testing.assert_close(asked[2][1, 2 * each :], own, rtol=0, atol=0)
        # The second reading enters the first layer as the context did, so there the halves agree.
        torch.testing.assert_close(asked[0][:, : 2 * each], asked[0][:, 2 * each :], rtol=0, atol=1e-5)


def test_heads_of_a_group_are_matched_together_and_groups_apart():
    """A model with 2 KV heads for 4 query heads, against layers of one KV head given each group's queries."""
    model = small_model(dtype=torch.float64)
    prefilled = prefill(model, [tokens(40)], needs=("queries",))
    kept = make("attention-matching:queries=context").compress(prefilled, Budget(tokens=6))
    compressor = AttentionMatching(queries="context")
    full, got = prefilled.cache.layers[1], kept.layers[1]
    moved = turned(prefilled.queries[1][0], 40, model)
    for g in range(2):
        one = LayerCache(
            full.keys_BGSD[:, g : g + 1], full.values_BGSE[:, g : g + 1], full.bias_BGS[:, g : g + 1]
        )
        q = torch.cat([moved[2 * g], moved[2 * g + 1]])[None]
        alone, _ = compressor.compress_layer(one, q, prefilled.scale, 6)
        torch.testing.assert_close(got.keys_BGSD[:, g], alone.keys_BGSD[:, 0], rtol=0, atol=0)
        torch.testing.assert_close(got.values_BGSE[:, g], alone.values_BGSE[:, 0], rtol=0, atol=1e-9)
        torch.testing.assert_close(got.bias_BGS[:, g], alone.bias_BGS[:, 0], rtol=0, atol=1e-6)


def test_turned_queries_are_those_of_later_positions():
    from kvcat_nemo.compress.hf_attention import run

    class Listener:
        def attend(self, layer, q, k, v, scale):
            if layer == 0:
                self.q = q[0]
            return q

    model = small_model(dtype=torch.float64)
    seen = []
    for first in (0, 40):
        listener = Listener()
        with torch.no_grad():
            run(model, torch.tensor([tokens(9)]), torch.arange(first, first + 9)[None], listener, logits=0)
        seen.append(listener.q)
    torch.testing.assert_close(turned(seen[0], 40, model), seen[1], rtol=0, atol=1e-5)  # float32 frequencies


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("queries", ["on-policy", "repeat"])
def test_second_reading_is_the_models_own(kind, queries):
    """Queries that reach each layer, against the model run by hand: the context, compressed or not, read again."""
    from kvcat_nemo.compress.hf_attention import attend_cache, run

    class Slow:
        """The reading with transformers' kernel over the caches; notes the queries of the last layer."""

        def __init__(self, layers):
            self.layers = layers

        def attend(self, layer, q, k, v, scale):
            self.q = q
            return attend_cache(self.layers[layer], q, k, v, scale)

    model = small_model(kind, dtype=torch.float64)
    ids = tokens(30)
    compressor = make(f"attention-matching:queries={queries}")
    prefilled = prefill(model, [ids])
    kept = compressor.compress(prefilled, Budget(tokens=7))
    slow = Slow(kept.layers if queries == "on-policy" else prefilled.cache.layers)
    with torch.no_grad():
        run(model, torch.tensor([ids]), torch.arange(30, 60)[None], slow, logits=0)
    q = slow.q[0].reshape(2, -1, slow.q.shape[-1])
    expected, _ = compressor.compress_layer(prefilled.cache.layers[-1], q, prefilled.scale, 7)
    torch.testing.assert_close(kept.layers[-1].keys_BGSD, expected.keys_BGSD, rtol=0, atol=0)
    torch.testing.assert_close(kept.layers[-1].values_BGSE, expected.values_BGSE, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "spec", ["", ":queries=on-policy", ":queries=repeat", ":queries=context:selection=highest"]
)
def test_small_models(spec):
    """Full budgets change nothing, small ones change little by little less, rows don't mix, positions stay."""
    model = small_model()
    compressor = make("attention-matching" + spec)
    rows = [tokens(48, 1), tokens(33, 2)]
    ids = torch.tensor([tokens(6, 8), tokens(6, 9)])
    prefilled = prefill(model, rows, needs=compressor.needs)
    full = next_logits(model, prefilled.cache, ids)
    same = compressor.compress(prefilled, Budget(keep_fraction=1))
    torch.testing.assert_close(next_logits(model, same, ids), full)
    errors = []
    for fraction in (0.05, 0.5, 0.9):
        kept = compressor.compress(prefilled, Budget(keep_fraction=fraction))
        assert kept.layers[0].slots_BG.tolist() == [[int(48 * fraction)] * 2, [int(33 * fraction)] * 2]
        assert kept.lengths_B.tolist() == [48, 33]
        errors.append(float((next_logits(model, kept, ids) - full).square().mean().detach()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    alone = compressor.compress(prefill(model, rows[1:], needs=compressor.needs), Budget(keep_fraction=0.5))
    both = compressor.compress(prefilled, Budget(keep_fraction=0.5))
    torch.testing.assert_close(
        next_logits(model, both, ids)[1:], next_logits(model, alone, ids[1:]), rtol=1e-3, atol=1e-3
    )


def test_bfloat16_models():
    """Values that half precision holds: the compressed cache is as good in bf16 as in float32, near enough."""
    ids = torch.tensor([tokens(12, 9)])
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(dtype=dtype)
        prefilled = prefill(model, [tokens(64)], needs=("queries",))
        full = next_logits(model, prefilled.cache, ids).float()
        kept = make("attention-matching").compress(prefilled, Budget(tokens=40))
        assert kept.layers[0].values_BGSE.dtype == dtype
        assert max(float(x.values_BGSE.abs().max()) for x in kept.layers) < 100
        change = (next_logits(model, kept, ids).float() - full).detach()
        errors[dtype] = float(change.square().mean() / full.detach().square().mean())
    assert errors[torch.bfloat16] < 1.5 * errors[torch.float32] + 0.01


def test_better_than_selection_on_the_same_slots():
    model = small_model()
    prefilled = prefill(model, [tokens(64)], needs=("queries", "attention"))
    ids = torch.tensor([tokens(16, 9)])
    full = next_logits(model, prefilled.cache, ids)

    def error(kept):
        return float((next_logits(model, kept, ids) - full).square().mean().detach())

    from kvcat_nemo.compress import select

    heavy = error(select(prefilled, prefilled.attention, 16))
    assert error(make("attention-matching").compress(prefilled, Budget(tokens=16))) < 0.8 * heavy


def test_auto_takes_omp_for_few_slots_and_the_highest_keys_of_half_the_tokens_for_many():
    few, many = (AttentionMatching().resolved(slots) for slots in (128, 129))
    assert (few.selection, few.reference_tokens) == ("omp", 1024)
    assert (many.selection, many.reference_tokens) == ("highest", 512)
    assert AttentionMatching(reference_tokens=0).resolved(500).reference_tokens == 0  # all stays all
    given = AttentionMatching(selection="omp")
    assert given.resolved(500) is given
    sculpt = make("kvsculpt:selection=auto:rounds=3").resolved(500)
    assert (sculpt.selection, sculpt.rounds) == ("highest", 3)
    prefilled = prefill(small_model(), [list(range(40))], needs=("queries",))
    by_default, by_omp = (
        make(f"attention-matching{spec}").compress(prefilled, Budget(tokens=10))
        for spec in ("", ":selection=omp")
    )
    for one, other in zip(by_default.layers, by_omp.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.read(), other.read(), strict=True))


def test_long_contexts_are_read_again_in_pieces():
    model = small_model()  # 512 positions
    ids = torch.arange(400)
    assert pieces_to_read(ids[:200], 1024, model).tolist() == [list(range(200))]
    pieces = pieces_to_read(ids, 0, model)  # 112 positions are left
    assert pieces.shape == (4, 112) and sorted(set(pieces.flatten().tolist())) == list(range(400))
    pieces = pieces_to_read(ids, 200, model)
    assert pieces.shape == (2, 112) and pieces[0, 0] == 0 and pieces[-1, -1] == 399
    assert pieces_to_read(torch.arange(2000), 1024, small_model(max_position_embeddings=8192)).shape == (
        8,
        128,
    )
    kept = make("attention-matching").compress(
        prefill(model, [tokens(400)], needs=("queries",)), Budget(tokens=9)
    )
    assert kept.slots == 9
    with pytest.raises(ValueError, match="no positions left to read it again"):
        make("attention-matching:queries=repeat").compress(prefill(model, [tokens(512)]), Budget(tokens=9))


def test_refusals():
    with pytest.raises(ValueError, match="selection='best': choose among auto, highest, omp"):
        make("attention-matching:selection=best")
    with pytest.raises(ValueError, match="queries='none': choose among mixed, on-policy"):
        make("attention-matching:queries=none")
    with pytest.raises(ValueError, match="ridge=0"):
        make("attention-matching:ridge=0")
    with pytest.raises(ValueError, match="reading_tokens=-1"):
        make("attention-matching:reading_tokens=-1")
    with pytest.raises(ValueError, match="omp_block=-1"):
        make("attention-matching:omp_block=-1")
