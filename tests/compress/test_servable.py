"""The form that engines take: what it keeps (float64 oracles), what it refuses, and what the command says of it."""

from __future__ import annotations

import pytest
import torch

from kvcat_nemo.compress import (
    Budget,
    KVCache,
    LayerCache,
    Servable,
    compress,
    compress_servable,
    make,
    next_logits,
    prefill,
)
from kvcat_nemo.compress.attention_matching_fit import reference
from kvcat_nemo.compress.folded import folded
from kvcat_nemo.compress.folding import fold, shared_direction
from kvcat_nemo.compress.rotation import rotated
from kvcat_nemo.compress.servable import anchored, document_digest, servable_facts
from tests.support.hf_models import small_model, tokens

FORM = Servable(block=4)
BUDGET = Budget(keep_fraction=0.3)


@torch.no_grad()
def log_probs(model, cache, ids):
    return next_logits(model, cache, torch.tensor([ids])).double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}]
)
def test_moved_keys_keep_every_distance(kind, scaling):
    """Keys moved by C − T and tokens from position C on: the same logits, to float64 rounding."""
    extra = {} if scaling is None else {"rope_scaling": scaling}
    model = small_model(kind, dtype=torch.float64, **extra)
    model.model.rotary_emb.double()
    ids, after = tokens(50), tokens(7, 1)
    cache = compress(model, [ids], make("recent:sinks=2"), Budget(tokens=20)).cache
    moved = anchored(model, cache, 20, Servable(block=4, dtype="float32"), text_tokens=50)
    assert moved.lengths_B.tolist() == [20]
    # The form's dtypes end at float32: the oracle keeps float64 keys.
    exact = [
        LayerCache(rotated(x.keys_BGSD, 20 - 50, model), x.values_BGSE, x.bias_BGS) for x in cache.layers
    ]
    exact = KVCache(exact, moved.lengths_B, {})
    expected = log_probs(model, cache, after)
    # transformers forms cosines in float32: positions move by roundings of its own.
    torch.testing.assert_close(log_probs(model, exact, after), expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(
        moved.layers[1].keys_BGSD.double(), exact.layers[1].keys_BGSD, rtol=1e-6, atol=1e-6
    )


def test_rotation_adds_up_and_is_that_of_the_model():
    model = small_model(dtype=torch.float64)
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = rotated(rotated(x, 5000, model), -5000, model)
    torch.testing.assert_close(there, x, rtol=0, atol=1e-12)
    once = rotated(rotated(x, 3, model), 4, model)
    torch.testing.assert_close(once, rotated(x, 7, model), rtol=0, atol=1e-12)
    ids = tokens(12)
    keys = prefill(model, [ids]).cache.layers[0].keys_BGSD
    first = prefill(model, [[ids[9]]]).cache.layers[0].keys_BGSD  # layer 0 sees the token alone
    torch.testing.assert_close(keys[:, :, 9:10], rotated(first, 9, model), rtol=0, atol=1e-5)


def test_a_bias_that_queries_can_carry_is_carried_exactly():
    """Queries with a constant coordinate: the folded keys give the same attention, and the values stay."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 8, dtype=torch.float64, generator=generator) for n in (300, 12, 12))
    q[..., 0] = 3.0
    bias = torch.randn(2, 12, dtype=torch.float64, generator=generator)
    scale = 8**-0.5
    s = q @ k.transpose(1, 2) * scale + bias[:, None]
    target = reference(q, k, v, scale)
    target.output_GQE = s.softmax(-1) @ v
    keys, values = fold(q, k, v, bias, target, scale, key_ridge=1e-14, value_ridge=1e-9)
    torch.testing.assert_close(q @ keys.transpose(1, 2) * scale, s, rtol=0, atol=1e-6)
    torch.testing.assert_close(values, v, rtol=0, atol=1e-5)


def test_the_shared_direction_is_the_ridge_solution():
    """Against torch.linalg.lstsq, head by head."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(3, 200, 6, dtype=torch.float64, generator=generator) + 0.5
    scale, ridge = 0.4, 1e-3
    found = shared_direction(q, scale, ridge)
    for head in range(3):
        rows = q[head] * scale
        root = (ridge * rows.square().mean() * 200).sqrt()
        rows = torch.cat([rows, root * torch.eye(6, dtype=torch.float64)])
        wanted = torch.cat([torch.ones(200, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)])
        solution = torch.linalg.lstsq(rows, wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(found[head], solution, rtol=1e-8, atol=1e-10)


SPECIFICATIONS = (
    "attention-matching",
    "attention-matching:queries=context",
    "kvsculpt:adaptive=false:iterations=2:rounds=1",
)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("spec", SPECIFICATIONS)
def test_folding_loses_less_than_dropping_the_weights(kind, spec):
    model = small_model(kind)
    ids, after = tokens(120), tokens(40, 5)
    dense = log_probs(model, prefill(model, [ids]).cache, after)
    prefilled = prefill(model, [ids], needs=("queries",))
    free = make(spec).compress(prefilled, Budget(tokens=36))
    assert any(layer.has_bias for layer in free.layers)
    dropped = KVCache(
        [LayerCache(*x.read(), torch.zeros_like(x.bias_BGS)) for x in free.layers], free.lengths_B
    )
    served = compress_servable(model, ids, make(spec), Budget(tokens=36), FORM).cache

    def kl(cache):
        return float((dense.exp() * (dense - log_probs(model, cache, after))).sum(-1).mean())

    assert not any(layer.has_bias for layer in served.layers)
    assert max(kl(served), kl(folded(prefilled, free))) < kl(dropped)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_counts_dtype_and_facts(dtype, tmp_path):
    model = small_model()
    ids = tokens(101)
    done = compress_servable(model, ids, make("attention-matching"), BUDGET, Servable(block=16, dtype=dtype))
    cache = done.cache
    assert {int(n) for layer in cache.layers for n in layer.slots_BG.flatten()} == {
        32
    }  # 30 of 101, in blocks
    assert {x.dtype for layer in cache.layers for x in layer.read()} == {getattr(torch, dtype)}
    assert cache.nbytes == 3 * 2 * 32 * 2 * 16 * (4 if dtype == "float32" else 2)
    assert cache.facts["compressor"] == "attention-matching" and cache.facts["budget"]["keep_fraction"] == 0.3
    cache.save(tmp_path / "a.kv")
    again = KVCache.load(tmp_path / "a.kv")
    facts = servable_facts(again, "a.kv")
    assert facts == {"form": 1, "slots": 32, "block": 16, "dtype": dtype, "text_tokens": 101}
    after = tokens(9, 3)
    torch.testing.assert_close(log_probs(model, again, after), log_probs(model, cache, after), rtol=0, atol=0)


def test_all_slots_are_the_full_cache():
    model = small_model()
    ids, after = tokens(64), tokens(9, 3)
    cache = compress_servable(model, ids, make("attention-matching"), Budget(keep_fraction=1), FORM).cache
    assert cache.lengths_B.tolist() == [64]
    dense = log_probs(model, prefill(model, [ids]).cache, after)
    torch.testing.assert_close(log_probs(model, cache, after), dense, rtol=0, atol=1e-5)


class Uneven:
    """A compressor with head budgets."""

    def __new__(cls):
        from dataclasses import dataclass

        from kvcat_nemo.compress import Compressor

        @dataclass
        class Made(Compressor):
            name = "uneven"

            def compress_row(self, prefilled, slots):
                layers = []
                for layer in prefilled.cache.layers:
                    index = torch.arange(2 * slots).expand(1, 2, -1)
                    present = torch.stack([index[0, 0] < slots - 4, index[0, 1] < slots + 4])[None]
                    layers.append(layer.take(index, present))
                return KVCache(layers, prefilled.cache.lengths_B)

        return Made()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"compressor": lambda: make("attention-matching+int4")},
            ("int4", "4-bit codes", "bfloat16 or float16"),
        ),
        ({"compressor": lambda: make("int8"), "budget": Budget(keep_fraction=1)}, ("int8", "leave int8 out")),
        ({"compressor": Uneven}, ("uneven", "layer 0", "head budgets", "16 to 24 slots")),
        ({"compressor": lambda: make("kvsculpt:iterations=1:rounds=1")}, ("kvsculpt", "head budgets")),
        ({"ids": tokens(3)}, ("block=4", "3 tokens")),
        ({"model": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}}, ("dynamic", "fixed rope")),
    ],
    ids=["int4", "int8", "head budgets", "adaptive", "short", "dynamic rope"],
)
def test_what_cannot_be_served_is_refused_by_name(change, words):
    model = small_model(**change.get("model", {}))
    maker = change.get("compressor", lambda: make("recent"))()
    with pytest.raises(ValueError) as error:
        compress_servable(
            model, change.get("ids", tokens(70)), maker, change.get("budget", Budget(tokens=20)), FORM
        )
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"block": 0}, ("block=0", "at least 1")),
        ({"block": True}, ("block=True",)),
        ({"dtype": "int8"}, ("dtype='int8'", "bfloat16")),
        ({"block": 10**12}, ("block",)),
    ],
)
def test_forms_that_are_none(values, words):
    with pytest.raises(ValueError) as error:
        Servable(**values)
    assert all(word in str(error.value) for word in words)


def test_numbers_beyond_float16_are_refused():
    model = small_model()
    cache = compress(model, [tokens(50)], make("recent"), Budget(tokens=20)).cache
    cache.layers[2].values_BGSE[0, 1, 3, 2] = 1e5
    with pytest.raises(ValueError, match="values of layer 2 are beyond its largest number, 65504"):
        anchored(model, cache, 20, Servable(dtype="float16"), text_tokens=50)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.facts["servable"].update(slots=99),
        lambda c: c.facts["servable"].update(dtype="float16"),
        lambda c: c.facts.update(servable={"form": 1}),
        lambda c: c.facts["servable"].update(form=7),
        lambda c: c.layers[1].bias_BGS.add_(1.0),
        lambda c: c.facts.pop("servable"),
    ],
)
def test_a_file_that_says_what_it_does_not_hold(damage, tmp_path):
    cache = compress_servable(small_model(), tokens(50), make("recent"), Budget(tokens=20), FORM).cache
    servable_facts(cache, "x")
    damage(cache)
    with pytest.raises(ValueError, match="paper.kv"):
        servable_facts(cache, "paper.kv")


def test_document_digest():
    assert document_digest([1, 23]) != document_digest([12, 3])
