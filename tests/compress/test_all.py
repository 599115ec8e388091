"""What every compressor must do, whatever its idea. A new name in the registry is tested here without further ado.

One that is too slow for many small tests gets cheaper settings in QUICK.
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from kvcat_nemo.compress import COMPRESSORS, Budget, KVCache, make, next_logits, prefill
from kvcat_nemo.compress.kivi import Quantisation
from kvcat_nemo.compress.prefill import NEEDS
from tests.support.hf_models import small_model, tokens

KINDS = ("llama", "qwen2", "qwen3")
QUICK = {
    "gradient": "gradient:steps=3:lessons=2:tokens=8",
    "kvsculpt": "kvsculpt:rounds=1:iterations=3",
}
NAMES = tuple(QUICK.get(name, name) for name, kind in COMPRESSORS.items() if not kind.trained)
SELECTIONS = tuple(name for name in NAMES if not isinstance(make(name), Quantisation))
VARIANTS = (
    "recent:sinks=2",
    "attention-matching:selection=highest",
    "kvsculpt:rounds=1:iterations=2:adaptive=False",
)
STACKS = ("random+int8", "attention-matching+int4")
# Quantisation alone changes logits: by so much of their range, at most.
BOUNDS = {"int8": 0.05, "int4": 0.6}
ROWS = (tokens(52, 1), tokens(33, 2))
NEXT = tokens(6, 3)


@functools.cache
def model_of(kind, dtype=torch.float32):
    return small_model(kind, dtype=dtype)


@functools.cache
def read(kind, rows=ROWS, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prefill(model_of(kind, dtype), [list(row) for row in rows], needs=NEEDS)


def rows(*of):
    return tuple(tuple(row) for row in of)


def after(kind, cache, dtype=torch.float32):
    ids = torch.tensor([NEXT] * cache.batch)
    with torch.no_grad():
        return next_logits(model_of(kind, dtype), cache, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES + VARIANTS + STACKS[:1])
def test_everything_kept_leaves_logits_as_they_were(name, kind):
    prefilled = read(kind, rows(*ROWS))
    full = after(kind, prefilled.cache)
    kept = make(name).compress(prefilled, Budget(keep_fraction=1))
    assert kept.layers[0].slots_BG.tolist() == [[52, 52], [33, 33]]
    bits = name.split("+")[-1]
    if bits in BOUNDS:
        off = (after(kind, kept) - full).abs().max() / (full.max() - full.min())
        assert 0 < float(off) < BOUNDS[bits]
    else:
        torch.testing.assert_close(after(kind, kept), full, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SELECTIONS + VARIANTS + STACKS)
def test_rows_of_unequal_lengths_get_their_budgets_and_positions(name, kind, tmp_path):
    prefilled = read(kind, rows(*ROWS))
    before = [x.clone() for layer in prefilled.cache.layers for x in (*layer.read(), layer.bias_BGS)]
    budget = Budget(keep_fraction=0.4)
    maker = make(name)
    kept = maker.compress(prefilled, budget)
    counts = torch.stack([layer.slots_BG for layer in kept.layers]).double().mean((0, 2))
    assert counts.tolist() == [20, 13] and kept.slots == pytest.approx(16.5)
    assert kept.lengths_B.tolist() == [52, 33]
    assert kept.nbytes < 0.5 * prefilled.cache.nbytes
    assert kept.facts["compressor"] == str(maker)
    # What was given is left as it was.
    now = [x for layer in prefilled.cache.layers for x in (*layer.read(), layer.bias_BGS)]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
    # A row alone is compressed as it is in the batch.
    logits = after(kind, kept)
    assert torch.isfinite(logits).all()
    alone = maker.compress(read(kind, rows(ROWS[1])), budget)
    off = (after(kind, alone)[0] - logits[1]).abs().max() / (logits.max() - logits.min())
    assert float(off) < (0.3 if "int4" in name else 0.02)
    # The file gives the very same logits.
    kept.save(tmp_path / "cache.safetensors")
    assert torch.equal(after(kind, KVCache.load(tmp_path / "cache.safetensors")), logits)


@pytest.mark.parametrize("name", SELECTIONS)
def test_positions_go_on_behind_the_full_text(name):
    """With one slot of many gone logits are nearly those of the full cache; at positions one off they are not."""
    prefilled = read("llama", rows(tokens(120, 4)))
    full = after("llama", prefilled.cache)
    kept = make(name).compress(prefilled, Budget(tokens=119))
    right = (after("llama", kept) - full).square().mean()
    kept.lengths_B = kept.lengths_B - 1
    shifted = (after("llama", kept) - full).square().mean()
    assert float(right) < float(shifted) / 4


@pytest.mark.parametrize("name", SELECTIONS + STACKS)
def test_bf16_is_finite_and_deterministic(name):
    prefilled = read("llama", rows(*ROWS), torch.bfloat16)
    caches = [make(name).compress(prefilled, Budget(tokens=12)) for _ in range(2)]
    assert caches[0].layers[0].read()[0].dtype == torch.bfloat16
    first, second = (after("llama", cache, torch.bfloat16) for cache in caches)
    assert torch.isfinite(first).all() and torch.equal(first, second)


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_smallest_budget_works_and_a_smaller_one_is_refused(name):
    prefilled = read("qwen2", rows(ROWS[0]))
    maker = make(name)
    kept = maker.compress(prefilled, Budget(tokens=maker.smallest))
    assert kept.slots == maker.smallest and torch.isfinite(after("qwen2", kept)).all()
    if maker.smallest > 1:
        with pytest.raises(ValueError, match=f"it needs {maker.smallest}"):
            maker.compress(prefilled, Budget(tokens=maker.smallest - 1))


@pytest.mark.parametrize("name", NAMES + VARIANTS + STACKS)
def test_names_make_the_same_compressor_again(name):
    maker = make(name)
    assert str(maker) == name and make(str(maker)) == maker
    assert set(maker.needs) <= set(NEEDS)


def test_all_names_are_tested():
    assert {name.split(":")[0] for name in NAMES} == {
        n for n, kind in COMPRESSORS.items() if not kind.trained
    }
