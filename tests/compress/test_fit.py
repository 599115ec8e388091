"""A cache is used with the model that made it alone, whatever entry it comes through."""

from __future__ import annotations

import copy

import pytest
import torch

from kvcat_nemo.compress import Budget, KVCache, LayerCache, extend, generate, make, next_logits, prefill
from kvcat_nemo.compress.fit import check_fits, know
from kvcat_nemo.compress.gradient import Lessons, optimise, teach
from tests.support.hf_models import small_model, tokens

IDS = torch.tensor([tokens(3)])
ENTRIES = {
    "extend": lambda model, cache: extend(model, cache, IDS),
    "next_logits": lambda model, cache: next_logits(model, cache, IDS),
    "generate": lambda model, cache: generate(model, cache, tokens(3), max_new_tokens=2),
    "teach": lambda model, cache: teach(model, cache, IDS[None]),
    "optimise": lambda model, cache: optimise(
        model, cache, Lessons(IDS[None], torch.zeros(1, 1, 3, 97)), steps=1, lr=0.01
    ),
}


def trained(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight *= 1.01
    return other


OTHERS = {
    "other weights": (lambda m: small_model(seed=1), "a model with other weights"),
    "trained weights": (trained, "a model with other weights"),
    "other rope": (lambda m: small_model(rope_theta=500.0), "other rotary frequencies"),
    "fewer layers": (lambda m: small_model(num_hidden_layers=2), "it has 3 layers, the model 2"),
    "more heads": (lambda m: small_model(num_key_value_heads=4), "layer 0 has 2 KV heads of 16 and 16"),
    "wider heads": (lambda m: small_model(head_dim=32), "the model 2 of 32"),
    "another architecture": (lambda m: small_model("qwen2"), "a model with other weights"),
}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module", params=["full", "random", "attention-matching+int8", "file", "grown"])
def cache(request, model, tmp_path_factory):
    kind = request.param
    full = prefill(model, [tokens(30)], needs=make("attention-matching").needs)
    if kind in ("random", "attention-matching+int8"):
        return make(kind).compress(full, Budget(keep_fraction=0.5))
    if kind == "file":
        path = tmp_path_factory.mktemp("caches") / "c.safetensors"
        make("random+int4").compress(full, Budget(keep_fraction=0.5)).save(path)
        return KVCache.load(path)
    return extend(model, full.cache, IDS)[1] if kind == "grown" else full.cache


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_model_that_made_it_may_use_it(entry, model, cache):
    ENTRIES[entry](model, cache)
    ENTRIES[entry](copy.deepcopy(model), cache)


@pytest.mark.parametrize("other", OTHERS)
def test_another_models_cache_is_refused(other, model, cache):
    make_other, message = OTHERS[other]
    another = make_other(model)
    for entry in ENTRIES.values():
        with pytest.raises(ValueError, match=f"{message}.*; compress the text again"):
            entry(another, cache)


def test_training_a_model_makes_it_another(model):
    mine = copy.deepcopy(model)
    cache = prefill(mine, [tokens(9)]).cache
    check_fits(mine, cache)
    mine.model.norm.weight.data.mul_(1.5)  # leaves no trace in the parameter's version
    with pytest.raises(ValueError, match="other weights"):
        check_fits(mine, cache)


def test_dtype_may_differ_but_not_the_files(model):
    cache = prefill(model, [tokens(9)]).cache
    half, other = (x.to(torch.bfloat16) for x in (copy.deepcopy(model), small_model(rope_theta=500.0)))
    check_fits(half, cache)
    assert len(generate(half, cache, tokens(2), max_new_tokens=2)) == 2
    with pytest.raises(ValueError, match="rotary frequencies"):
        check_fits(other, cache)
    know(half, "a" * 64, "half")
    cache.facts |= {"model": "b" * 64, "model_name": "whole"}
    with pytest.raises(ValueError, match="made by whole .*, not by half"):
        check_fits(half, cache)


def test_caches_made_by_hand_or_by_older_versions_are_compared_by_shape(model):
    cache = prefill(model, [tokens(9)]).cache
    cache.facts = {"model": "b" * 64}
    check_fits(small_model(seed=1), cache)  # not loaded from files that it knows
    with pytest.raises(ValueError, match="it has 3 layers, the model 2"):
        check_fits(small_model(num_hidden_layers=2), cache)


def test_rows_and_numbers_must_agree(model):
    cache = prefill(model, [tokens(9)]).cache
    two = KVCache(cache.layers, torch.tensor([9, 9]))
    with pytest.raises(ValueError, match="layer 0: 1 rows, but lengths of 2"):
        check_fits(model, two)
    layers = [LayerCache(x.keys_BGSD.int(), x.values_BGSE.int(), x.bias_BGS) for x in cache.layers]
    with pytest.raises(ValueError, match="must be floating-point numbers"):
        check_fits(model, KVCache(layers, cache.lengths_B))
    with pytest.raises(ValueError, match=r"cache of \[0\] tokens of text: must be above 0"):
        next_logits(model, KVCache(cache.layers, torch.tensor([0])), IDS)
    moved = cache.to("cpu")
    assert torch.equal(moved.layers[0].keys_BGSD, cache.layers[0].keys_BGSD) and moved.facts == cache.facts
    meta = cache.to("meta")
    with pytest.raises(ValueError, match=r"cache on meta, the model on cpu; move it: cache.to\('cpu'\)"):
        check_fits(model, meta)


@pytest.mark.parametrize(
    "made, used", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_another_models_cache_is_found_across_dtypes(made, used):
    """A cache made in float32 and read in 16 bits, as servable caches are: rounding is no other model."""

    def of(seed, dtype):
        return small_model(seed=seed).to(torch.bfloat16).to(getattr(torch, dtype))

    cache = prefill(of(0, made), [tokens(9)]).cache
    check_fits(of(0, used), cache)
    with pytest.raises(ValueError, match="other weights"):
        check_fits(of(1, used), cache)
