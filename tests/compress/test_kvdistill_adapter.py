"""KV-Distill's adapters on Hugging Face models: against the oracle of method/, folders, budgets, long contexts, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvcat_nemo.compress import Budget, KVCache, next_logits, prefill
from kvcat_nemo.compress.kivi import Int4
from kvcat_nemo.compress.kvdistill import Adapter, KVDistill, encode, load_adapter, save_adapter
from kvcat_nemo.compress.kvdistill.adapter import (
    CARD,
    WEIGHTS,
    adapted,
    check_base,
    expected_shapes,
    shape_of,
)
from kvcat_nemo.compress.stack import Stack
from kvcat_nemo.method.kvdistill import KVDistillConfig, RoutedLoRA, Scorer
from kvcat_nemo.method.kvdistill.reference import Adapters, Decoder, Layer, three_streams
from tests.support.hf_models import small_model, tokens

ROWS = (tokens(52, 1), tokens(33, 2))
NEXT = tokens(6, 3)


def random_adapter(model, dtype=torch.float32, **settings) -> Adapter:
    config = KVDistillConfig(
        **{"scorer_layer": 1, "lora_rank": 4, "lora_alpha": 8.0, "always_keep": 2} | settings
    )
    shape = shape_of(model.config)
    rng = torch.Generator().manual_seed(5)
    drawn = {
        name: (torch.randn(size, generator=rng, dtype=torch.float64) / size[-1] ** 0.5).to(dtype)
        for name, size in expected_shapes(config, shape).items()
    }
    lora = {
        (i, p): tuple(
            drawn[f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight"] for x in "AB"
        )
        for i, p in adapted(shape["num_hidden_layers"])
    }
    scorer = {name: drawn[f"scorer.{name}"] for name in ("up.weight", "up.bias", "down.weight", "down.bias")}
    return Adapter(config, shape, lora, scorer, "f" * 64, "small")


@pytest.fixture(scope="module")
def model():
    return small_model("llama")


@pytest.fixture
def folder(model, tmp_path):
    save_adapter(random_adapter(model), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("eta", [1, 3])
def test_the_compressed_cache_answers_as_the_oracle_does(routing, eta):
    """In float64: the answer's logits of method.kvdistill.reference, from the file's matrices alone."""
    model = small_model("llama", dtype=torch.float64)
    adapter = random_adapter(
        model, torch.float64, scorer_layer=eta, routing=routing, keep_gate_at_inference=True
    )
    context, answer = tokens(21, 1), tokens(5, 2)
    layers, routed = [], []
    for i, layer in enumerate(model.model.layers):
        w = layer.self_attn
        parts = [
            layer.input_layernorm,
            w.q_proj,
            w.k_proj,
            w.v_proj,
            w.o_proj,
            layer.post_attention_layernorm,
        ]
        mlp = [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
        layers.append(Layer(*(x.weight.detach() for x in parts + mlp)))
        routed.append(Adapters(**{p: lora_of(adapter, i, p, w) for p in "qkvo"}))
    plain = Decoder(
        model.model.embed_tokens.weight.detach(), layers, model.model.norm.weight.detach(), w.head_dim
    )
    plain.output_VM = model.lm_head.weight.detach()
    scorer = Scorer(64, adapter.config)
    scorer.up.double(), scorer.down.double()
    scorer.load_state_dict(adapter.scorer)
    expected = three_streams(plain, scorer, routed, torch.tensor(context + answer), 21, 8, adapter.config)
    cache = encode(model, torch.tensor(context), 8, adapter)
    with torch.no_grad():
        logits = next_logits(model, cache, torch.tensor([answer]))[0]
    assert cache.layers[0].slots_BG.tolist() == [[8, 8]]
    # transformers computes norms and rotary angles in float32 in a float64 model too.
    torch.testing.assert_close(logits, expected.student_TV.detach(), rtol=0, atol=1e-5)


def lora_of(adapter: Adapter, layer: int, projection: str, attention) -> RoutedLoRA:
    linear = getattr(attention, f"{projection}_proj")
    module = RoutedLoRA(linear.in_features, linear.out_features, 4, adapter.config.lora_scale, 0).double()
    if (layer, projection) in adapter.lora:
        with torch.no_grad():
            module.down.copy_(adapter.lora[layer, projection][0])
            module.up.copy_(adapter.lora[layer, projection][1])
    return module


def test_folders_come_back_as_they_were(model, folder):
    before, after = random_adapter(model), load_adapter(folder)
    assert (before.config, before.shape, before.base_fingerprint) == (
        after.config,
        after.shape,
        after.base_fingerprint,
    )
    assert all(torch.equal(x, after.scorer[name]) for name, x in before.scorer.items())
    assert before.lora.keys() == after.lora.keys()
    assert all(
        torch.equal(x, y)
        for key in before.lora
        for x, y in zip(before.lora[key], after.lora[key], strict=True)
    )
    card = json.loads((folder / CARD).read_text())
    assert card["peft_type"] == "LORA" and card["use_rslora"] and card["r"] == 4
    with pytest.raises(ValueError, match="adapter"):
        save_adapter(before, folder)
    save_adapter(before, folder, replace=True)


def test_budgets_are_exact_and_batches_of_unequal_length_are_rows(model, folder, tmp_path):
    maker = KVDistill(adapter=str(folder))
    prefilled = prefill(model, [list(row) for row in ROWS])
    kept = maker.compress(prefilled, Budget(keep_fraction=0.4))
    for layer in kept.layers:
        assert layer.slots_BG.tolist() == [[20, 20], [13, 13]] and not layer.has_bias
    assert kept.lengths_B.tolist() == [52, 33] and kept.facts["compressor"] == f"kv-distill:adapter={folder}"
    alone = maker.compress(prefill(model, [list(ROWS[1])]), Budget(keep_fraction=0.4))
    ids = torch.tensor([NEXT])
    with torch.no_grad():
        both = next_logits(model, kept, ids.repeat(2, 1))
        one = next_logits(model, alone, ids)
    torch.testing.assert_close(one[0], both[1], rtol=0, atol=2e-5)
    kept.save(tmp_path / "cache.safetensors")
    with torch.no_grad():
        assert torch.equal(
            next_logits(model, KVCache.load(tmp_path / "cache.safetensors"), ids.repeat(2, 1)), both
        )
    quantised = Stack(maker, Int4()).compress(prefilled, Budget(keep_fraction=0.4))
    assert quantised.nbytes < 0.5 * kept.nbytes


def test_everything_kept_without_training_is_the_plain_cache(model):
    adapter = random_adapter(model)
    for _, up in adapter.lora.values():
        up.zero_()
    cache = encode(model, torch.tensor(ROWS[0]), 52, adapter)
    full = prefill(model, [list(ROWS[0])]).cache
    for ours, theirs in zip(cache.layers, full.layers, strict=True):
        torch.testing.assert_close(ours.keys_BGSD, theirs.keys_BGSD, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.values_BGSE, theirs.values_BGSE, rtol=0, atol=1e-5)


def test_the_model_is_left_as_it_was(model):
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    encode(model, torch.tensor(ROWS[0]), 9, random_adapter(model))
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_a_long_context_is_read_in_parts_at_its_own_positions(model):
    adapter = random_adapter(model, context_window=20)
    ids, told = torch.tensor(ROWS[0]), []
    cache = encode(model, ids, 12, adapter, on_part=lambda *x: told.append(x))
    assert told == [(i, 6) for i in range(1, 7)]
    assert cache.lengths_B.tolist() == [52] and all(x.slots_BG.tolist() == [[12, 12]] for x in cache.layers)
    for _, up in adapter.lora.values():
        up.zero_()
    everything = encode(model, ids, 52, adapter)
    last = small_part(model, ids[40:], 40)
    torch.testing.assert_close(everything.layers[2].keys_BGSD[0, :, 40:], last, rtol=0, atol=1e-5)


def small_part(model, ids, start):
    """Keys of the last layer when these tokens alone are read at their places."""
    found = []
    handler = type("Handler", (), {})()
    from kvcat_nemo.compress.hf_attention import causal, run

    def attend(layer, q, k, v, scale):
        found.append(k[0])
        return causal(q, k, v, scale)

    handler.attend = attend
    with torch.no_grad():
        run(model, ids[None], torch.arange(start, start + len(ids))[None], handler, logits=0)
    return found[-1]


def test_spans_that_must_stay_stay(model):
    adapter = random_adapter(model)
    whole = torch.zeros(52, dtype=torch.bool)
    whole[30:40] = True
    cache = encode(model, torch.tensor(ROWS[0]), 14, adapter, whole_T=whole)
    assert cache.layers[0].slots_BG.tolist() == [[14, 14]]
    with pytest.raises(ValueError, match="11 slots, but 12 tokens must stay"):
        encode(model, torch.tensor(ROWS[0]), 11, adapter, whole_T=whole)


def test_another_model_is_refused(model, folder):
    adapter = load_adapter(folder)
    with pytest.raises(ValueError, match="num_hidden_layers=3, the model 2"):
        check_base(adapter, small_model("llama", num_hidden_layers=2).config, None, allow_other=False)
    with pytest.raises(ValueError, match="trained for small .* allow_other_base=true"):
        check_base(adapter, model.config, "0" * 64, allow_other=False)
    check_base(adapter, model.config, "0" * 64, allow_other=True)
    check_base(adapter, model.config, None, allow_other=False)
    with pytest.raises(ValueError, match=r"kv-distill:adapter=FOLDER"):
        KVDistill().compress(prefill(model, [list(ROWS[0])]), Budget(tokens=9))


DAMAGE = {
    "no card": lambda f: (f / CARD).unlink(),
    "card cut": lambda f: (f / CARD).write_text((f / CARD).read_text()[:50]),
    "card is a list": lambda f: (f / CARD).write_text("[]"),
    "card is null": lambda f: (f / CARD).write_text("null"),
    "plain lora": lambda f: edit(f, lambda c: c.pop("kvcat")),
    "future format": lambda f: edit(f, lambda c: c["kvcat"].update(format=2)),
    "no shape": lambda f: edit(f, lambda c: c["kvcat"].pop("shape")),
    "huge shape": lambda f: edit(f, lambda c: c["kvcat"]["shape"].update(num_hidden_layers=10**30)),
    "text for a size": lambda f: edit(f, lambda c: c["kvcat"]["shape"].update(hidden_size="64")),
    "unknown setting": lambda f: edit(f, lambda c: c["kvcat"]["settings"].update(extra=1)),
    "bad setting": lambda f: edit(f, lambda c: c["kvcat"]["settings"].update(lora_rank=0)),
    "text for a setting": lambda f: edit(f, lambda c: c["kvcat"]["settings"].update(keep_min="x")),
    "settings missing": lambda f: edit(f, lambda c: c["kvcat"].update(settings=None)),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "weights cut": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:900]),
    "tensor missing": lambda f: tensors(f, lambda t: t.pop("scorer.up.bias")),
    "tensor too many": lambda f: tensors(f, lambda t: t.update(more=torch.zeros(1))),
    "other shape": lambda f: tensors(f, lambda t: t.update({"scorer.up.bias": torch.zeros(3)})),
    "whole numbers": lambda f: tensors(f, lambda t: t.update({"scorer.up.bias": torch.zeros(64, dtype=torch.int32)})),
    "not finite": lambda f: tensors(f, lambda t: t["scorer.down.weight"].fill_(float("nan"))),
}  # fmt: skip


def edit(folder, change):
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))


def tensors(folder, change):
    found = {name: x.clone() for name, x in load_file(folder / WEIGHTS).items()}
    change(found)
    save_file(found, folder / WEIGHTS)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_refused_by_name(folder, name):
    DAMAGE[name](folder)
    with pytest.raises(ValueError, match="adapter|scorer|kvdistill"):
        load_adapter(folder)
