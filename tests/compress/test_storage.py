"""Caches come back from disk as they were, and broken files are named."""

from __future__ import annotations

import json

import pytest
import torch
from hf_models import small_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcat_nemo.compress import Budget, KVCache, LayerCache, make, next_logits, prefill
from kvcat_nemo.compress.cache import FORMAT


def ragged(dtype=torch.float32) -> KVCache:
    """Two rows, heads of different lengths, biases."""
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        k, v = torch.randn(2, 2, 2, 9, 16, dtype=dtype)
        bias = torch.randn(2, 2, 9)
        for b, g, n in ((0, 0, 9), (0, 1, 4), (1, 0, 1), (1, 1, 7)):
            bias[b, g, n:] = -torch.inf
        layers.append(LayerCache(k, v, bias))
    return KVCache(layers, torch.tensor([20, 11]), {"compressor": "made up", "budget": {"tokens": 9}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ragged_heads_and_biases_come_back(tmp_path, dtype):
    cache = ragged(dtype)
    cache.save(tmp_path / "cache.safetensors")
    again = KVCache.load(tmp_path / "cache.safetensors")
    assert again.lengths_B.tolist() == [20, 11] and again.facts == cache.facts
    assert (again.slots, again.nbytes) == (cache.slots, cache.nbytes)
    for got, layer in zip(again.layers, cache.layers, strict=True):
        there = layer.present_BGS
        assert torch.equal(got.bias_BGS, layer.bias_BGS)
        assert got.keys_BGSD.dtype == dtype
        assert torch.equal(got.keys_BGSD[there], layer.keys_BGSD[there])
        assert torch.equal(got.values_BGSE[there], layer.values_BGSE[there])


def test_files_hold_no_padding_and_no_empty_bias(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache = ragged()
    cache.save(path)
    sizes = {name: x.shape[0] for name, x in load_file(path).items() if name.startswith("0.k")}
    assert sizes == {"0.keys_PD": 9 + 4 + 1 + 7}
    with safe_open(path, "pt") as file:
        header = len(json.dumps(file.metadata()))
    assert path.stat().st_size < cache.nbytes + header + 3000  # the rest is safetensors' own table of names
    prefill(small_model(), [tokens(20)]).cache.save(path)
    assert "0.bias_P" not in load_file(path)
    assert [x.name for x in tmp_path.iterdir()] == ["cache.safetensors"]  # no temporary file is left


def test_loaded_caches_go_on_alike(tmp_path):
    model = small_model()
    kept = make("random").compress(prefill(model, [tokens(30), tokens(12)]), Budget(keep_fraction=0.5))
    kept.save(tmp_path / "cache.safetensors")
    ids = torch.tensor([tokens(5, 9)] * 2)
    again = KVCache.load(tmp_path / "cache.safetensors")
    assert torch.equal(next_logits(model, again, ids), next_logits(model, kept, ids))


def test_broken_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "cache.safetensors"
    with pytest.raises(ValueError, match=r"cache\.safetensors: no such file"):
        KVCache.load(path)
    ragged().save(path)
    whole = path.read_bytes()
    for size in (0, 5, 400, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cache\.safetensors: cut off, damaged"):
            KVCache.load(path)
    path.write_text("some text that is no safetensors file at all")
    with pytest.raises(ValueError, match=r"cache\.safetensors: cut off, damaged, or no safetensors"):
        KVCache.load(path)
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"not a KV cache in the format {FORMAT} \(its format: pt\)"):
        KVCache.load(path)
    with pytest.raises(ValueError, match="is no KV cache of kvcat; it is not replaced"):
        ragged().save(path)
    path.unlink()
    ragged().save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    for name in ("1.keys_PD", "2.counts_BG", "lengths_B"):
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, tmp_path / "less.safetensors", header)
        with pytest.raises(ValueError, match=r"less\.safetensors: damaged cache file"):
            KVCache.load(tmp_path / "less.safetensors")
    tensors = load_file(path)
    tensors["0.keys_PD"] = tensors["0.keys_PD"][1:].clone()
    save_file(tensors, tmp_path / "less.safetensors", header)
    with pytest.raises(ValueError, match=r"less\.safetensors: damaged cache file.*20 entries for 21 places"):
        KVCache.load(tmp_path / "less.safetensors")


def test_refusals(tmp_path):
    cache = ragged()
    with pytest.raises(ValueError, match="its folder does not exist"):
        cache.save(tmp_path / "nowhere" / "cache.safetensors")
    cache.facts["model"] = object()
    with pytest.raises(ValueError, match="plain JSON"):
        cache.save(tmp_path / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []
