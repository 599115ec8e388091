"""Caches come back from disk as they were, and broken files are named."""

from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcat_nemo.compress import Budget, KVCache, LayerCache, make, next_logits, prefill
from kvcat_nemo.compress.cache import FORMAT
from tests.support.hf_models import small_model, tokens


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


def rewritten(path, *, tensors=None, description=None):
    """The file once more, with some tensors and parts of its description changed."""
    there = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    told = json.loads(header["cache"])
    for name, x in (tensors or {}).items():
        there[name] = x(there[name]) if callable(x) else x
    text = description(told) if description else told
    save_file(
        {name: x.contiguous() for name, x in there.items()},
        path,
        {"format": FORMAT, "cache": text if isinstance(text, str) else json.dumps(text)},
    )


@pytest.fixture
def nothing_is_padded(monkeypatch):
    """Loading must end before memory is asked for."""
    from kvcat_nemo.compress import layers, quantised

    def spread(*args, **kwargs):
        raise AssertionError("memory was asked for before the file was checked")

    for module in (layers, quantised):
        monkeypatch.setattr(module, "spread", spread)


@pytest.fixture
def quantised_file(tmp_path):
    path = tmp_path / "quantised.safetensors"
    full = prefill(small_model(), [tokens(90), tokens(70)])
    make("random+int4").compress(full, Budget(keep_fraction=0.9)).save(path)
    return path


@pytest.mark.parametrize("bit", [0, 7, 15, 24, 30, 31])
def test_a_bit_of_a_count_asks_for_no_memory(tmp_path, bit, nothing_is_padded):
    path = tmp_path / "cache.safetensors"
    ragged().save(path)

    def flip(x):
        x = x.clone()
        number = int(x.flatten()[1]) ^ (1 << bit)
        x.view(-1)[1] = number - (1 << 32) if number >= 1 << 31 else number
        return x

    rewritten(path, tensors={"0.counts_BG": flip})
    with pytest.raises(ValueError, match="damaged cache file"):
        KVCache.load(path)


@pytest.mark.parametrize("bit", [0, 5, 9, 14, 15])
def test_a_bit_of_a_groups_count_asks_for_no_memory(quantised_file, bit, nothing_is_padded):
    def flip(x):
        x = x.clone()
        number = (int(x.flatten()[0]) & 0xFFFF) ^ (1 << bit)
        x.view(-1)[0] = number - (1 << 16) if number >= 1 << 15 else number
        return x

    rewritten(quantised_file, tensors={"0.group_counts_BGC": flip})
    with pytest.raises(ValueError, match="damaged cache file"):
        KVCache.load(quantised_file)


def layer_setting(name, value):
    def change(told):
        told["layers"][0][name] = value
        return told

    return change


@pytest.mark.parametrize(
    "description",
    [
        *(layer_setting("group", x) for x in (2**40, 40000, 0, -1, 1.5, True, None, "64")),
        *(layer_setting("bits", x) for x in (5, 2**40, "4", None)),
        *(layer_setting("window", x) for x in (-1, 1e300, "9", None)),
        layer_setting("kind", "zip"),
        layer_setting("more", 1),
        lambda told: {**told, "layers": 10**9},
        lambda told: {**told, "layers": []},
        lambda told: {**told, "layers": told["layers"] * 1000},
        lambda told: {**told, "layers": [1] * len(told["layers"])},
        lambda told: {**told, "facts": [1]},
        lambda told: [],
        lambda told: "[" * 100_000,
        lambda told: "9" * 10_000,
        lambda told: "NaN",
    ],
)
def test_a_description_asks_for_no_memory(quantised_file, description, monkeypatch):
    asked, zeros, arange = [], torch.Tensor.new_full, torch.arange
    monkeypatch.setattr(
        torch.Tensor,
        "new_full",
        lambda x, size, *a: asked.append(torch.Size(size).numel()) or zeros(x, size, *a),
    )
    monkeypatch.setattr(torch, "arange", lambda n, **o: asked.append(n) or arange(n, **o))
    rewritten(quantised_file, description=description)
    with pytest.raises(ValueError, match=r"quantised\.safetensors: damaged cache file"):
        KVCache.load(quantised_file)
    assert sum(asked) < 1_000_000


@pytest.mark.parametrize(
    "tensors",
    [
        {"lengths_B": torch.tensor([20, -11])},
        {"lengths_B": torch.tensor([20, 0])},
        {"lengths_B": torch.tensor([20])},
        {"lengths_B": torch.tensor([20.0, 11.0])},
        {"lengths_B": torch.tensor([[20, 11]])},
        {"0.counts_BG": torch.zeros(2, 2)},
        {"0.counts_BG": torch.zeros(0, 2, dtype=torch.int32)},
        {"0.counts_BG": torch.tensor([9, 4, 1, 7], dtype=torch.int32)},
        {"0.keys_PD": lambda x: x[:, :0]},
        {"0.keys_PD": lambda x: x.int()},
        {"0.keys_PD": lambda x: x[..., None]},
        {"0.values_PE": lambda x: x[1:]},
        {"0.bias_P": lambda x: x[1:]},
        {"0.bias_P": lambda x: x[:, None]},
        {"7.keys_PD": torch.zeros(3, 4)},
    ],
)
def test_tensors_that_do_not_agree_are_refused(tmp_path, tensors, nothing_is_padded):
    path = tmp_path / "cache.safetensors"
    ragged().save(path)
    rewritten(path, tensors=tensors)
    with pytest.raises(ValueError, match="damaged cache file"):
        KVCache.load(path)


def test_padding_beyond_the_machines_memory_is_refused(tmp_path, monkeypatch, nothing_is_padded):
    # A small file may ask for much: one long head among a million empty ones.
    path = tmp_path / "cache.safetensors"
    ragged().save(path)
    rows, slots = 300_000, 60_000
    counts = torch.zeros(rows, 2, dtype=torch.int32)
    counts[0, 0] = slots
    tensors = {"lengths_B": torch.ones(rows, dtype=torch.long)}
    for layer in range(3):
        tensors |= {f"{layer}.counts_BG": counts.clone(), f"{layer}.bias_P": torch.zeros(slots)}
        tensors |= {f"{layer}.{x}": torch.zeros(slots, 1, dtype=torch.half) for x in ("keys_PD", "values_PE")}
    rewritten(path, tensors=tensors)
    with pytest.raises(ValueError, match="bytes when padded, the machine has"):
        KVCache.load(path)


# Files that an earlier version wrote, and what their keys, values and biases were when it read them.
OLD = {
    "plain": "72f2cd9df7c71d7e1043f59f39243f84969692d5d372a9a2217eb12be08773f7",
    "bias": "45e5cb6b32b44b8f039f576d953b7907811a5fa32768539694bc7f52e62fe02e",
    "int8": "9532df3e4356edf1253d7db3d45360fdbef5826079ba0db0ef144cdd6ae41f8f",
    "int4": "5e8d8e746b30e9fc634c33878d091248f9aca75dad7db835aa39605816e6939f",
}


@pytest.mark.parametrize("name", OLD)
def test_files_of_an_earlier_version_are_read_as_it_read_them(name, tmp_path):
    path = Path(__file__).parent / "old" / f"{name}.safetensors"
    cache, digest = KVCache.load(path), hashlib.sha256()
    for layer in cache.layers:
        for x in (*layer.read(), layer.bias_BGS):
            digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == OLD[name] and cache.lengths_B.tolist() == [24, 17]
    assert cache.facts["made_by"] and cache.facts["budget"]
    cache.save(tmp_path / "again")
    for name, x in load_file(path).items():  # and written as it wrote them
        assert torch.equal(load_file(tmp_path / "again")[name], x), name


def test_a_file_of_another_format_is_refused_by_its_name(tmp_path):
    path = Path(__file__).parent / "old" / "plain.safetensors"
    (tmp_path / "new").write_bytes(path.read_bytes().replace(FORMAT.encode(), b"kvcat-kv-cache-9"))
    with pytest.raises(
        ValueError, match="not a KV cache in the format kvcat-kv-cache-1 .its format: kvcat-kv-cache-9"
    ):
        KVCache.load(tmp_path / "new")


@pytest.mark.parametrize("size", [1 << 63, 1 << 40, (1 << 40) + 8, 200 << 20])
def test_a_header_of_absurd_size_allocates_nothing(size, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(size.to_bytes(8, "little") + b'{"a":1}' * 9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="cut off, damaged, or no safetensors file"):
        KVCache.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
