"""Codes against a readable float64 form; layers that grow, split, stack and are kept in files; stacks of compressors."""

from __future__ import annotations

import pytest
import torch

from kvcat_nemo.compress import (
    Budget,
    KVCache,
    LayerCache,
    extend,
    make,
    next_logits,
    prefill,
    stack_rows,
)
from kvcat_nemo.compress.quantised import QuantisedLayer, encode, from_bytes, to_bytes
from tests.support.hf_models import small_model, tokens


def layer(S=70, B=1, G=2, D=16, E=32, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    k = torch.randn(B, G, S, D, dtype=dtype)
    k[..., 3] = 40 + k[..., 3]  # a channel that is large in every token
    return LayerCache(k, torch.randn(B, G, S, E, dtype=dtype), torch.randn(B, G, S))


def naive(x, bits):
    """One group of numbers: nearest of 2^bits even steps from the lowest to the highest, in float64."""
    lowest = x.min().half().double()
    step = ((x.max() - lowest) / (2**bits - 1)).clamp(min=0).half().double()
    if step == 0:
        return torch.full_like(x, float(lowest))
    return lowest + step * ((x - lowest) / step).round().clamp(0, 2**bits - 1)


def naive_layer(plain, bits, group):
    keys, values = plain.keys_BGSD.double().clone(), plain.values_BGSE.double().clone()
    B, G, S, D = keys.shape
    channels = group if values.shape[-1] % group == 0 else values.shape[-1]
    for b in range(B):
        for g in range(G):
            for first in range(0, S, group):
                for d in range(D):
                    keys[b, g, first : first + group, d] = naive(keys[b, g, first : first + group, d], bits)
            for s in range(S):
                for first in range(0, values.shape[-1], channels):
                    values[b, g, s, first : first + channels] = naive(
                        values[b, g, s, first : first + channels], bits
                    )
    return keys, values


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [8, 32, 7])
def test_codes_are_those_of_the_readable_form(bits, group):
    plain = layer(S=40)
    got = QuantisedLayer.of(plain, bits=bits, group=group, window=0, recent=0)
    keys, values = naive_layer(plain, bits, group)
    there = got.present_BGS
    assert int(there.sum()) == 80
    # A number half-way between two steps may round to either in float32.
    for mine, theirs in ((got.keys_BGSD, keys), (got.values_BGSE, values)):
        mine = mine[there].reshape(theirs.shape).double()
        off = (mine - theirs).abs()
        assert float((off > 1e-5).double().mean()) < 0.01
    torch.testing.assert_close(got.bias_BGS[there], plain.bias_BGS.flatten())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_error_is_at_most_half_a_step(bits, size):
    torch.manual_seed(1)
    x = (torch.randn(50, 32, 16) + 20 * torch.randn(16)) * size
    codes, lowest, step = encode(x, torch.ones(32, 1, dtype=torch.bool), bits, -2)
    back = codes * step.float()[:, None] + lowest.float()[:, None]
    bound = step.double()[:, None] * 0.5 + lowest.double().abs()[:, None] * 2**-11 + 6e-8
    assert bool(((back.double() - x.double()).abs() <= bound * (1 + 1e-5)).all())
    assert torch.equal(from_bytes(to_bytes(codes, bits), bits), codes)
    assert to_bytes(codes, bits).shape[-1] == (16 if bits == 8 else 8)


def test_equal_numbers_are_kept_as_they_are():
    x = torch.full((2, 1, 32, 16), 0.75)
    got = QuantisedLayer.of(LayerCache(x, x, torch.zeros(2, 1, 32)), bits=4, group=32, window=0, recent=0)
    assert torch.equal(got.keys_BGSD, x) and torch.equal(got.values_BGSE, x)


def test_padding_does_not_set_the_scale():
    plain = layer(S=40)
    short = LayerCache(plain.keys_BGSD[:, :, :25], plain.values_BGSE[:, :, :25], plain.bias_BGS[:, :, :25])
    plain.keys_BGSD[:, :, 25:] = 1e4
    plain.bias_BGS[:, :, 25:] = -torch.inf
    a, b = (QuantisedLayer.of(x, bits=4, group=32, window=0, recent=0) for x in (plain, short))
    assert torch.equal(a.keys_BGSD[a.present_BGS], b.keys_BGSD[b.present_BGS])
    assert a.nbytes == b.nbytes


def test_bytes_are_those_of_the_tensors_kept():
    plain = layer(S=96)
    for bits, window in ((8, 0), (4, 0), (4, 32)):
        got = QuantisedLayer.of(plain, bits=bits, group=32, window=window, recent=window)
        c = got.coded
        held = [
            c.keys_BGCgd, c.keys_lowest_BGCD, c.keys_step_BGCD, c.values_BGCge, c.values_lowest_BGCgF,
            c.values_step_BGCgF, got.bias_BGS, got.recent.keys_BGSD, got.recent.values_BGSE,
        ]  # fmt: skip
        assert got.nbytes == sum(x.numel() * x.element_size() for x in held)
    # int4, no window, no bias: codes 24 bytes a slot, values' scales 4, keys' scales 64 for 32 slots.
    plain.bias_BGS.zero_()
    assert QuantisedLayer.of(plain, bits=4, group=32, window=0, recent=0).nbytes == 2 * 96 * (24 + 4 + 2)


@pytest.mark.parametrize("bits", [8, 4])
def test_new_slots_stay_in_the_window_and_are_coded_in_groups_behind_it(bits):
    whole = layer(S=100)
    part = LayerCache(whole.keys_BGSD[:, :, :52], whole.values_BGSE[:, :, :52], whole.bias_BGS[:, :, :52])
    grown = QuantisedLayer.of(part, bits=bits, group=16, window=20, recent=20)
    assert grown.coded.bias_BGCg.shape[2] == 2 and grown.recent.slots_BG.tolist() == [[20, 20]]
    for s in range(52, 100):
        new = [x[:, :, s : s + 1] for x in (whole.keys_BGSD, whole.values_BGSE, whole.bias_BGS)]
        before = grown.bias_BGS.clone()
        bigger = grown.append(*new)
        assert torch.equal(grown.bias_BGS, before)  # the old one is left as it was
        grown = bigger
    assert grown.recent.bias_BGS.shape[2] == 20
    assert torch.equal(grown.recent.keys_BGSD, whole.keys_BGSD[:, :, -20:])
    once = QuantisedLayer.of(whole, bits=bits, group=16, window=20, recent=20)
    for a, b in zip(grown.read(), once.read(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(grown.bias_BGS, whole.bias_BGS) and grown.nbytes == once.nbytes


@pytest.mark.parametrize("specification", ["int8", "int4:group=16:window=0", "random+int4"])
def test_rows_stack_and_come_apart_and_files_give_them_back(tmp_path, specification):
    model = small_model()
    rows = [tokens(90, 1), tokens(41, 2)]
    maker = make(specification)
    budget = Budget(keep_fraction=0.6 if "+" in specification else 1)
    both = maker.compress(prefill(model, rows), budget)
    alone = [maker.compress(prefill(model, [row]), budget) for row in rows]
    ids = torch.tensor([tokens(4, 9)] * 2)
    logits, grown = extend(model, both, ids)
    both.save(tmp_path / "cache.safetensors")
    again = KVCache.load(tmp_path / "cache.safetensors")
    assert again.facts == both.facts and again.facts["compressor"] == specification
    assert torch.equal(next_logits(model, again, ids), logits)
    assert (again.nbytes, again.slots) == (both.nbytes, both.slots)
    assert isinstance(again.layers[0], QuantisedLayer) and isinstance(grown.layers[0], QuantisedLayer)
    for b in range(2):
        single = next_logits(model, alone[b], ids[:1])
        torch.testing.assert_close(logits[b : b + 1], single, rtol=1e-4, atol=1e-4)
        row = both.row(b)
        assert row.nbytes == alone[b].nbytes
        torch.testing.assert_close(next_logits(model, row, ids[:1]), single, rtol=1e-4, atol=1e-4)
    restacked = stack_rows([both.row(0), both.row(1)])
    assert torch.equal(next_logits(model, restacked, ids), logits)
    row = grown.row(1)  # has holes where the shorter row was padded; the file has none
    row.save(tmp_path / "cache.safetensors")
    back = KVCache.load(tmp_path / "cache.safetensors")
    torch.testing.assert_close(
        next_logits(model, back, ids[:1]), next_logits(model, row, ids[:1]), rtol=1e-4, atol=1e-5
    )


def test_grown_ragged_batches_keep_their_logits_in_files(tmp_path):
    """Rows padded at the end leave holes in the recent part and later in groups."""
    model = small_model()
    cache = make("int4:group=4:window=4").compress(
        prefill(model, [tokens(30, 1), tokens(18, 2)]), Budget(keep_fraction=1)
    )
    for n in range(4):
        ids = torch.tensor([tokens(5, n), tokens(5, n + 9)])
        _, cache = extend(model, cache, ids, lengths_B=torch.tensor([5, 1 + n]))
    assert cache.layers[0].slots_BG.tolist() == [[50, 50], [28, 28]]
    cache.save(tmp_path / "cache.safetensors")
    again = KVCache.load(tmp_path / "cache.safetensors")
    assert again.nbytes == cache.nbytes
    ids = torch.tensor([tokens(4, 20)] * 2)
    torch.testing.assert_close(
        next_logits(model, again, ids), next_logits(model, cache, ids), rtol=1e-4, atol=1e-5
    )


def test_logits_stay_close_and_int8_closer():
    model = small_model(dtype=torch.float64)
    prefilled = prefill(model, [tokens(200)])
    ids = torch.tensor([tokens(8, 9)])
    full = next_logits(model, prefilled.cache, ids).detach()
    errors = {}
    for name in ("int8", "int4"):
        logits = next_logits(model, make(name).compress(prefilled, Budget(keep_fraction=1)), ids)
        errors[name] = float((logits.detach() - full).abs().max() / full.abs().max())
    assert 0 < errors["int8"] < 0.02 and errors["int8"] < errors["int4"] / 4


def test_biases_survive():
    plain = layer(S=64)
    cache = KVCache([plain], torch.tensor([64]))
    got = make("int4").quantise(cache).layers[0]
    assert torch.equal(got.bias_BGS, plain.bias_BGS) and got.has_bias


def test_bf16_stays_bf16():
    got = QuantisedLayer.of(layer(dtype=torch.bfloat16), bits=8, group=32, window=8, recent=8)
    assert got.keys_BGSD.dtype == torch.bfloat16
    # K and V: 1 byte a number, value scales 4 bytes a slot, key scales 64 bytes for 32 slots, against 2 bytes a number.
    plain = layer(S=64, dtype=torch.bfloat16)
    plain.bias_BGS.zero_()
    assert QuantisedLayer.of(plain, bits=8, group=32, window=0, recent=0).nbytes == 2 * 64 * (48 + 4 + 2)
    assert plain.nbytes == 2 * 64 * 96


def test_taking_slots_gives_a_plain_layer():
    got = QuantisedLayer.of(layer(), bits=8, group=32, window=0, recent=0)
    taken = got.take(torch.tensor([[[1, 5], [0, 69]]]))
    assert type(taken) is LayerCache
    assert torch.equal(taken.keys_BGSD[0, 1], got.keys_BGSD[0, 1, [0, 69]])


def test_refusals():
    prefilled = prefill(small_model(), [tokens(20)])
    with pytest.raises(ValueError, match=r"int4: 10 slots.*drops none.*attention-matching\+int4"):
        make("int4").compress(prefilled, Budget(keep_fraction=0.5))
    with pytest.raises(ValueError, match=r"int8:window=4: 19 slots \(19 slots of 20 tokens\)"):
        make("int8:window=4").compress(prefilled, Budget(tokens=19))
    with pytest.raises(ValueError, match="after \\+ comes a quantisation"):
        make("random+recent")
    with pytest.raises(ValueError, match="quantised twice"):
        make("int8+int4")
    with pytest.raises(ValueError, match=r"A\+B"):
        make("random+int8+int4")
    with pytest.raises(ValueError, match="window=-1"):
        make("int4:window=-1")
    with pytest.raises(ValueError, match="group=0"):
        make("random+int4:group=0")
    with pytest.raises(ValueError, match="head dims 3 and 4"):
        x = torch.zeros(1, 1, 5, 4)
        QuantisedLayer.of(LayerCache(x[..., :3], x, x[..., 0]), bits=4, group=4, window=0, recent=0)


def test_stacked_specifications_are_the_names_they_were_made_from():
    for name in ("int4:group=16", "random:seed=3+int8", "recent:sinks=2+int4:window=0"):
        assert str(make(name)) == name
