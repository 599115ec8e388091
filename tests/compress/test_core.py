"""Prefill and decode against transformers' own forward; budgets, batches and refusals."""

from __future__ import annotations

import pytest
import torch

from kvcat_nemo.compress import (
    Budget,
    KVCache,
    LayerCache,
    extend,
    generate,
    make,
    next_logits,
    prefill,
    stack_rows,
)
from tests.support.hf_models import small_model, tokens

KINDS = ("llama", "qwen2", "qwen3")


def plain_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_full_cache_goes_on_as_transformers_does(kind):
    model = small_model(kind, dtype=torch.float64)
    ids = tokens(40)
    expected = plain_logits(model, ids)
    prefilled = prefill(model, [ids[:25]])
    torch.testing.assert_close(prefilled.logits_BV[0], expected[24], rtol=0, atol=1e-12)
    logits = next_logits(model, prefilled.cache, torch.tensor([ids[25:]]))
    torch.testing.assert_close(logits[0], expected[25:], rtol=0, atol=1e-12)
    # The model is left as it was.
    torch.testing.assert_close(plain_logits(model, ids), expected, rtol=0, atol=0)


def test_rows_of_unequal_lengths():
    model = small_model(dtype=torch.float64)
    rows = [tokens(30, 1), tokens(17, 2), tokens(23, 3)]
    news = [tokens(5, 4), tokens(2, 5), tokens(4, 6)]
    more = [tokens(3, 7), tokens(3, 8), tokens(3, 9)]
    prefilled = prefill(model, rows, needs=("queries", "attention", "hidden_states"))
    ids = torch.tensor([x + [0] * (5 - len(x)) for x in news])
    logits, cache = extend(model, prefilled.cache, ids, lengths_B=torch.tensor([5, 2, 4]))
    after = next_logits(model, cache, torch.tensor(more))
    for b, (row, new, extra) in enumerate(zip(rows, news, more, strict=True)):
        expected = plain_logits(model, row + new + extra)
        torch.testing.assert_close(prefilled.logits_BV[b], expected[len(row) - 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            logits[b, : len(new)], expected[len(row) : len(row) + len(new)], rtol=0, atol=1e-12
        )
        torch.testing.assert_close(after[b], expected[len(row) + len(new) :], rtol=0, atol=1e-12)
        alone = prefill(model, [row], needs=("queries", "attention", "hidden_states"))
        mine = prefilled.row(b)
        for name in ("queries", "attention", "hidden_states"):
            for a, e in zip(getattr(mine, name), getattr(alone, name), strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    assert cache.row(1).lengths_B.tolist() == [19]
    torch.testing.assert_close(
        next_logits(model, cache.row(1), torch.tensor([more[1]]))[0], after[1], rtol=0, atol=1e-12
    )


def test_attention_mass_is_the_sum_of_softmax_columns():
    model = small_model()
    got = prefill(model, [tokens(300)], needs=("queries", "attention"))
    q, k = got.queries[1].double(), got.cache.layers[1].keys_BGSD.double().repeat_interleave(2, 1)
    s = (q @ k.transpose(-1, -2)) * got.scale
    a = s.masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(
        got.attention[1].double(), a.sum(2).reshape(1, 2, 2, 300).sum(2), rtol=1e-4, atol=1e-4
    )
    assert float(got.attention[1].sum()) == pytest.approx(4 * 300, rel=1e-4)


def test_bias_weighs_slots_as_copies_of_them_would():
    """A slot with bias log n is attended as n equal slots are."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 5, 16, dtype=torch.float64)
    q, new_k, new_v = torch.randn(3, 1, 2, 3, 16, dtype=torch.float64)
    from kvcat_nemo.compress.hf_attention import attend_cache

    zero = torch.zeros(1, 2, 7)
    twice = LayerCache(torch.cat([k, k[:, :, :2]], 2), torch.cat([v, v[:, :, :2]], 2), zero)
    bias = torch.zeros(1, 2, 5, dtype=torch.float64)
    bias[..., :2] = torch.tensor(2.0, dtype=torch.float64).log()
    weighed = LayerCache(k, v, bias)
    out = [attend_cache(layer, q, new_k, new_v, 0.25) for layer in (twice, weighed)]
    torch.testing.assert_close(*out, rtol=0, atol=1e-7)  # biases enter as float32


@pytest.mark.parametrize("name", ["random", "recent", "recent:sinks=2"])
def test_everything_kept_changes_nothing(name):
    model = small_model()
    prefilled = prefill(model, [tokens(20)])
    kept = make(name).compress(prefilled, Budget(keep_fraction=1))
    ids = torch.tensor([tokens(4, 9)])
    torch.testing.assert_close(next_logits(model, kept, ids), next_logits(model, prefilled.cache, ids))


def test_recent_keeps_the_last_slots_and_the_sinks():
    model = small_model()
    prefilled = prefill(model, [tokens(20)])
    kept = make("recent:sinks=2").compress(prefilled, Budget(tokens=5))
    full = prefilled.cache.layers[0].keys_BGSD
    torch.testing.assert_close(kept.layers[0].keys_BGSD, full[:, :, [0, 1, 17, 18, 19]], rtol=0, atol=0)
    assert kept.slots == 5 and kept.lengths_B.tolist() == [20]
    assert kept.nbytes == 3 * 2 * 5 * 2 * 16 * 4


def test_batches_compress_each_row_to_its_own_budget():
    model = small_model()
    rows = [tokens(30, 1), tokens(10, 2)]
    kept = make("random").compress(prefill(model, rows), Budget(keep_fraction=0.5))
    assert kept.layers[0].slots_BG.tolist() == [[15, 15], [5, 5]]
    alone = make("random").compress(prefill(model, rows[1:]), Budget(keep_fraction=0.5))
    ids = torch.tensor([tokens(4, 9)])
    torch.testing.assert_close(
        next_logits(model, kept, ids.repeat(2, 1))[1:], next_logits(model, alone, ids), rtol=1e-4, atol=1e-5
    )


def test_short_contexts_are_left_as_they_are_with_a_warning():
    prefilled = prefill(small_model(), [tokens(20), tokens(3)])
    with pytest.warns(UserWarning, match="context of 3 tokens is within the budget of 5 slots"):
        kept = make("recent").compress(prefilled, Budget(tokens=5))
    assert kept.layers[0].slots_BG.tolist() == [[5, 5], [3, 3]]


def test_generation_from_a_full_cache_is_transformers_greedy_text():
    model = small_model(dtype=torch.float64)
    ids = tokens(30)
    expected = ids + [5]
    for _ in range(8):
        expected.append(int(plain_logits(model, expected)[-1].argmax()))
    cache = prefill(model, [ids]).cache
    got = generate(model, cache, [5], max_new_tokens=8)
    assert got == expected[31:]
    assert generate(model, cache, [5], max_new_tokens=8) == got  # asked again: the cache was not changed
    assert generate(model, cache, [5], max_new_tokens=8, stop_ids=(got[3],)) == got[: got.index(got[3])]


@pytest.mark.parametrize(
    "fraction, length, slots", [(0.1, 768, 76), (0.05, 768, 38), (0.29, 100, 29), (0.2, 1000, 200), (1, 7, 7)]
)
def test_budget_rounds_down_and_not_through_binary_fractions(fraction, length, slots):
    assert Budget(keep_fraction=fraction).slots(length) == slots


def test_refusals():
    with pytest.raises(ValueError, match="either keep_fraction or tokens"):
        Budget()
    with pytest.raises(ValueError, match="keep_fraction=0"):
        Budget(keep_fraction=0.0)
    with pytest.raises(ValueError, match="keeps nothing: give at least 0.1"):
        Budget(keep_fraction=0.05).slots(10)
    model = small_model()
    with pytest.raises(ValueError, match="empty document"):
        prefill(model, [[]])
    with pytest.raises(ValueError, match="context of 513 tokens: the model reads 512"):
        prefill(model, [tokens(513)])
    with pytest.raises(ValueError, match="sliding_window"):
        prefill(small_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1), [[1]])
    with pytest.raises(ValueError, match="it needs 3"):
        make("recent:sinks=2").compress(prefill(model, [tokens(20)]), Budget(tokens=2))
    with pytest.raises(ValueError, match="choose among"):
        make("nonsense")
    with pytest.raises(ValueError, match="'sink=1' is not a setting; recent has sinks="):
        make("recent:sink=1")
    with pytest.raises(ValueError, match="prompt"):
        generate(model, prefill(model, [[1]]).cache, [], max_new_tokens=1)


def test_stacked_rows_come_apart_again():
    model = small_model()
    one, two = (prefill(model, [tokens(n, n)]).cache for n in (9, 14))
    both = stack_rows([one, two])
    assert isinstance(both, KVCache) and both.batch == 2
    for b, cache in enumerate((one, two)):
        row = both.row(b)
        for got, layer in zip(row.layers, cache.layers, strict=True):
            assert torch.equal(got.keys_BGSD, layer.keys_BGSD) and torch.equal(got.bias_BGS, layer.bias_BGS)


def test_specifications_are_the_names_they_were_made_from():
    assert str(make("recent:sinks=2")) == "recent:sinks=2"
    assert str(make("random")) == "random" and make("random:seed=3").settings == {"seed": 3}


def test_settings_are_read_in_their_types():
    assert make("gradient:lr=1e-2").lr == 0.01 and make("rkv:weight=1").weight == 1.0
    for name, message in (
        ("gradient:lr=fast", "lr=fast: give a number, as in"),
        ("int4:group=2.5", "group=2.5: give a whole number"),
        ("kvsculpt:adaptive=1", "adaptive=1: give true or false"),
        ("gradient:text=3", "text=3: give a word"),
        ("gradient:lr=[1", r"lr=\[1: give a number"),
    ):
        with pytest.raises(ValueError, match=message):
            make(name)
