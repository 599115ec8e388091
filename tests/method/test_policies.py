"""Random and attention masks: what they keep, and on what they depend."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from kvcat_nemo.method.accumulated_attention import accumulated_attention, attention_gate
from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.policies import POLICIES
from kvcat_nemo.method.random_draws import prefix_ids, random_gate, random_prefix

TOKENS = torch.randint(0, 50_000, (64, 2048), generator=torch.Generator().manual_seed(0))


def gate(tokens=TOKENS, keep=0.5, seed=1, group=0):
    return random_gate(prefix_ids(tokens), keep=keep, seed=seed, group=group)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_random_keeps_its_fraction(keep):
    drawn = gate(keep=keep)
    assert set(drawn.unique().tolist()) == {0.0, 1.0} and drawn.dtype == torch.float32
    sigma = math.sqrt(keep * (1 - keep))
    assert abs(drawn.mean() - keep) < 4 * sigma / math.sqrt(drawn.numel())
    assert (drawn.mean(1) - keep).abs().max() < 5 * sigma / math.sqrt(2048)  # each window
    assert (drawn.mean(0) - keep).abs().max() < 5.5 * sigma / math.sqrt(64)  # each position


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs().item()


def test_random_is_independent_across_positions_groups_windows_and_seeds():
    drawn = gate()
    bound = 4.5 / math.sqrt(drawn.numel())
    for lag in (1, 2, 3, 64):
        assert correlation(drawn[:, lag:], drawn[:, :-lag]) < bound, lag
    for group in (1, 2, 3):
        assert correlation(drawn, gate(group=group)) < bound
    for seed in (0, 2, 1234):
        assert correlation(drawn, gate(seed=seed)) < bound
    assert correlation(drawn[1:], drawn[:-1]) < bound * 1.1
    nearly = TOKENS.clone()
    nearly[:, 0] += 1  # all but one token alike: another window all the same
    assert correlation(gate(nearly), drawn) < bound


def test_random_is_deterministic_and_free_of_generators():
    first = gate()
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert torch.equal(gate(), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_does_not_depend_on_the_place_in_the_batch():
    drawn = gate()
    order = torch.randperm(len(TOKENS), generator=torch.Generator().manual_seed(1))
    assert torch.equal(gate(TOKENS[order]), drawn[order])
    assert torch.equal(gate(TOKENS[5:6].int()), drawn[5:6])


def test_a_later_token_never_changes_an_earlier_random_gate():
    drawn = gate()
    changed = TOKENS.clone()
    changed[:, 1000] += 1
    after = gate(changed)
    assert torch.equal(after[:, :1000], drawn[:, :1000])
    assert correlation(after[:, 1000:], drawn[:, 1000:]) < 0.02
    assert torch.equal(gate(TOKENS[:, :100]), drawn[:, :100])


def test_prefix_ids_tell_content_apart():
    tokens = torch.randint(0, 50, (1, 16), generator=torch.Generator().manual_seed(0))
    swapped = tokens.clone()
    swapped[0, [3, 4]] = torch.tensor([1, 2])
    back = swapped.clone()
    back[0, [3, 4]] = torch.tensor([2, 1])
    changed = tokens.clone()
    changed[0, -1] += 1
    rows = torch.cat([tokens, swapped, back, changed, tokens.flip(1)])
    assert len(set(prefix_ids(rows)[:, -1].tolist())) == 5


@pytest.mark.parametrize("keep,tokens", [(0.5, 16), (0.5, 17), (0.1, 16), (0.99, 7), (0.01, 7)])
def test_attention_keeps_its_count_in_every_window(keep, tokens):
    mass = torch.rand(3, tokens)
    kept = attention_gate(mass, keep)
    assert kept.sum(1).tolist() == [math.ceil(keep * tokens)] * 3
    for row in range(3):  # and the heaviest
        heavy = kept[row] == 1
        assert mass[row][heavy].min() >= (mass[row][~heavy].max() if (~heavy).any() else 0)


@pytest.mark.parametrize("block", [1, 4, 512])
def test_accumulated_attention_is_the_column_sum_of_the_softmax(block):
    rng = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 13, 6, 4, generator=rng), torch.randn(2, 13, 2, 4, generator=rng)
    expected = torch.zeros(2, 13)
    for head in range(6):
        s = torch.einsum("bid,bjd->bij", q[:, :, head], k[:, :, head // 3]) * 0.5
        s = s.masked_fill(torch.ones(13, 13).triu(1).bool(), float("-inf"))
        expected += s.softmax(-1).sum(1)
    torch.testing.assert_close(accumulated_attention(q, k, scale=0.5, block=block), expected)


DOCUMENTS = (5, 1, 17, 9)
POSITIONS = torch.cat([torch.arange(n) for n in DOCUMENTS]).expand(2, -1)


def parts(x):
    return x.split(DOCUMENTS, 1)


def test_a_documents_random_gate_is_as_if_alone():
    tokens = TOKENS[:2, : sum(DOCUMENTS)]
    ids = prefix_ids(tokens, POSITIONS)
    packed = random_gate(ids, keep=0.5, seed=1, group=0, position_BT=POSITIONS)
    assert not torch.equal(packed, gate(tokens))
    for document, drawn in zip(parts(tokens), parts(packed), strict=True):
        assert torch.equal(gate(document), drawn)


def test_a_documents_attention_gate_is_as_if_alone():
    mass = torch.rand(2, sum(DOCUMENTS), generator=torch.Generator().manual_seed(0))
    packed = attention_gate(mass, 0.3, POSITIONS)
    for document, kept in zip(parts(mass), parts(packed), strict=True):
        assert torch.equal(attention_gate(document, 0.3), kept)


@pytest.mark.parametrize("block", [3, 512])
def test_accumulated_attention_of_documents_and_of_some_queries(block):
    rng = torch.Generator().manual_seed(0)
    T = sum(DOCUMENTS)
    q, k = (torch.randn(2, T, heads, 4, generator=rng, dtype=torch.float64) for heads in (6, 2))
    whole = accumulated_attention(q, k, scale=0.5)
    places = torch.randperm(T, generator=rng)
    some = [
        accumulated_attention(q[:, part], k, scale=0.5, block=block, places_T=part)
        for part in places.split(20)
    ]
    torch.testing.assert_close(sum(some), whole, rtol=0, atol=1e-12)
    packed = accumulated_attention(q, k, scale=0.5, block=block, position_BT=POSITIONS)
    for a, b, mass in zip(parts(q), parts(k), parts(packed), strict=True):
        torch.testing.assert_close(accumulated_attention(a, b, scale=0.5), mass, rtol=0, atol=1e-12)


KEEP = {"keep_min": 0.03, "keep_max": 0.4}


def prefix(tokens, position=None, seed=1, **keep):
    return random_prefix(prefix_ids(tokens, position), seed=seed, position_BT=position, **KEEP | keep)


SHORT = torch.randint(0, 50_000, (6000, 17), generator=torch.Generator().manual_seed(0))


def test_every_place_of_a_cut_is_as_likely_and_there_is_one():
    cut, _ = prefix(SHORT)
    assert (cut.sum(1) == 1).all() and not cut[:, 0].any()
    counts = cut.sum(0)[1:]
    expected = len(SHORT) / 16
    assert (counts - expected).abs().max() < 4.5 * math.sqrt(expected)
    assert (
        float(((counts - expected) ** 2 / expected).sum()) < 37.7
    )  # χ² of 15 degrees of freedom, one in a thousand


def test_the_kept_fraction_is_log_uniform_between_its_bounds():
    cut, keep = prefix(SHORT)
    assert (keep == keep[:, :1]).all() and keep.min() >= 0.03 and keep.max() < 0.4
    u = (keep[:, 0] / 0.03).log() / math.log(0.4 / 0.03)
    ordered, places = u.sort().values, (torch.arange(len(u)) + 0.5) / len(u)
    assert (ordered - places).abs().max() < 1.95 / math.sqrt(len(u))  # Kolmogorov-Smirnov, one in a thousand
    assert correlation(keep[:, 0], cut.double().argmax(1).double()) < 4.5 / math.sqrt(len(u))
    drawn = random_gate(prefix_ids(TOKENS), keep=prefix(TOKENS)[1], seed=1, group=0)
    error = drawn.mean(1) - prefix(TOKENS)[1][:, 0]
    assert error.abs().max() < 5 * 0.5 / math.sqrt(2048) and drawn.mean(1).std() > 0.05
    assert (prefix(SHORT, keep_min=0.2, keep_max=0.2)[1] == 0.2).all()


def test_cuts_depend_on_the_seed_and_the_window_alone():
    first, state = prefix(SHORT), torch.get_rng_state()
    order = torch.randperm(len(SHORT), generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(prefix(SHORT[order]), first, strict=True):
        assert torch.equal(ours, theirs[order])
    assert torch.equal(torch.get_rng_state(), state)
    other = prefix(SHORT, seed=2)
    assert correlation(other[1][:, 0], first[1][:, 0]) < 4.5 / math.sqrt(len(SHORT))
    same = (other[0] & first[0]).any(1).double().mean()
    assert abs(same - 1 / 16) < 4.5 * math.sqrt(1 / 16 / len(SHORT))


def test_a_later_token_changes_neither_an_earlier_cut_nor_its_fraction():
    cut, keep = prefix(SHORT)
    changed = SHORT.clone()
    changed[:, 9] += 1
    after, after_keep = prefix(changed)
    assert torch.equal(after[:, :10], cut[:, :10])
    early = cut[:, :10].any(1)
    assert torch.equal(after_keep[early], keep[early]) and 0.4 < early.double().mean() < 0.7
    assert not torch.equal(after, cut)


def test_each_packed_document_is_cut_as_if_it_were_alone():
    lengths = [5, 1, 2, 9]
    position = torch.cat([torch.arange(n) for n in lengths]).expand(len(SHORT), -1)
    cut, keep = prefix(SHORT, position)
    at = 0
    for n in lengths:
        alone, alone_keep = prefix(SHORT[:, at : at + n])
        assert torch.equal(cut[:, at : at + n], alone) and torch.equal(keep[:, at : at + n], alone_keep)
        assert (alone.sum(1) == (n > 1)).all()
        at += n


@pytest.mark.parametrize("multiple,places", [(4, [4, 8, 12, 16]), (16, [16]), (17, []), (100, [])])
def test_cuts_at_multiples(multiple, places):
    cut, _ = prefix(SHORT, multiple=multiple)
    assert cut.any(0).nonzero()[:, 0].tolist() == places and (cut.sum(1) == bool(places)).all()
    if len(places) > 1:
        expected = len(SHORT) / len(places)
        assert (cut.sum(0)[places] - expected).abs().max() < 4.5 * math.sqrt(expected)


def test_every_policy_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    table = page.partition("## Policies")[2].partition("## Settings")[0]
    assert list(POLICIES) == list(dict.fromkeys(re.findall(r"(?m)^\| `(\w+)`", table)[1:]))
    for policy in POLICIES.values():
        assert sum(
            (policy.has_routers, policy.reads_tokens, policy.reads_attention, policy.own_model)
        ) == int(policy.paired)
        assert set(policy.settings) <= {field.name for field in fields(KVCatConfig)}
