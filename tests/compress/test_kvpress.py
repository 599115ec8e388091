"""kvpress through the adapter against kvpress run by hand on the same tokens, and the traps met on the way."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from kvcat_nemo.compress import Budget, compress, make, next_logits, prefill
from kvcat_nemo.compress.hf_attention import NAME, _attention
from tests.support.hf_models import small_model, tokens

T, SLOTS, MORE = 150, 37, 5
TEMPLATE = "{% for m in messages %}SYSTEM SAYS BE KIND. USER: {{ m['content'] }}{% endfor %} ANSWER:"
SMOLLM2 = Path(__file__).parents[2] / "models" / "smollm2-135m"


def kvpress():
    """Missing where the mark says it must be: a failure, not a skip."""
    import kvpress

    return kvpress


@contextmanager
def attention_of(model, implementation):
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    try:
        yield
    finally:
        model.config._attn_implementation = before


@torch.no_grad()
def by_hand(model, press, ids, more, *, attention="sdpa", position=None):
    """kvpress as its pages say: hooks on the prefill, then token by token behind the shortened cache."""
    with attention_of(model, attention):
        cache = DynamicCache()
        torch.manual_seed(0)
        with press(model):
            model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
        kept = [(layer.keys, layer.values) for layer in cache.layers]
        masks = [getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers]
        at, logits = len(ids) if position is None else position, []
        for i, token in enumerate(more):
            out = model(
                input_ids=torch.tensor([[token]]),
                past_key_values=cache,
                position_ids=torch.tensor([[at + i]]),
            )
            logits.append(out.logits[0, 0])
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return torch.stack(logits), kept, masks


def places(keys_SD, full_TD):
    """Where rows of keys stand in all keys: the nearest, for both passes round differently."""
    return torch.cdist(keys_SD.double(), full_TD.double()).argmin(-1).tolist()


def slots_by_hand(kept, masks, prefilled):
    out = []
    for (keys, _), mask, layer in zip(kept, masks, prefilled.cache.layers, strict=True):
        gone = set() if mask is None else set(zip(mask[1].tolist(), mask[2].tolist(), strict=True))
        for g in range(keys.shape[1]):
            stored = [s for s in range(keys.shape[2]) if (g, s) not in gone]
            out.append(sorted(places(keys[0, g, stored], layer.keys_BGSD[0, g])))
    return out


def slots_of(cache, prefilled):
    out = []
    for layer, full in zip(cache.layers, prefilled.cache.layers, strict=True):
        for g in range(layer.bias_BGS.shape[1]):
            present = layer.present_BGS[0, g]
            out.append(places(layer.keys_BGSD[0, g, present], full.keys_BGSD[0, g]))
    return out


def inner(name, **settings):
    return lambda k, ratio: getattr(k, name)(
        press=k.ExpectedAttentionPress(compression_ratio=ratio), **settings
    )


def plain(name, **settings):
    return lambda k, ratio: getattr(k, name)(compression_ratio=ratio, **settings)


# Our specification, kvpress by hand, the attention it needs.
CASES = {
    "h2o": plain("ObservedAttentionPress"),
    "snapkv:window_size=16": plain("SnapKVPress", window_size=16),
    "streaming-llm": plain("StreamingLLMPress"),
    "expected-attention": plain("ExpectedAttentionPress"),
    "tova": plain("TOVAPress"),
    "knorm": plain("KnormPress"),
    "keydiff": plain("KeyDiffPress"),
    "pyramidkv:window_size=8:beta=2": plain("PyramidKVPress", window_size=8, beta=2),
    "adakv:press=ExpectedAttentionPress": inner("AdaKVPress"),
    "adakv:window_size=8:alpha_safeguard=0.4": lambda k, ratio: k.AdaKVPress(
        press=k.SnapKVPress(compression_ratio=ratio, window_size=8), alpha_safeguard=0.4
    ),
    "kvpress.CriticalAdaKVPress:press=KnormPress": lambda k, ratio: k.CriticalAdaKVPress(
        press=k.KnormPress(compression_ratio=ratio)
    ),
    "kvpress.CURPress": plain("CURPress"),
    "kvpress.LagKVPress:lag_size=16": plain("LagKVPress", lag_size=16),
    "kvpress.CompactorPress": plain("CompactorPress"),
    "kvpress.RandomPress:seed=3": plain("RandomPress", seed=3),
    "kvpress.BlockPress:press=ExpectedAttentionPress": inner("BlockPress"),
    "kvpress.MergingPress:press=ExpectedAttentionPress": inner("MergingPress"),
    "kvpress.EntropyGatedChunkKVPress:press=ExpectedAttentionPress": inner("EntropyGatedChunkKVPress"),
    "kvpress.KVComposePress": plain("KVComposePress"),
}


@pytest.mark.kvpress
@pytest.mark.parametrize(
    ("specification", "kind"),
    # CriticalKV looks for config.head_dim, which Qwen2 does not have.
    [
        (case, kind)
        for case in CASES
        for kind in ("llama", "qwen2")
        if "Critical" not in case or kind == "llama"
    ],
)
def test_equals_kvpress_by_hand(specification, kind):
    model = small_model(kind, dtype=torch.float64)
    text = tokens(T + MORE)
    ids, more = text[:T], text[T:]
    press = CASES[specification](kvpress(), 1 - (SLOTS + 0.001) / T)
    attention = "eager" if specification == "h2o" else "sdpa"
    expected, kept, masks = by_hand(model, press, ids, more, attention=attention)

    prefilled = prefill(model, [ids])
    cache = make(specification).compress(prefilled, Budget(tokens=SLOTS))
    per_layer = "Compose" in specification or "pyramid" in specification  # rounds in every layer
    assert cache.slots == pytest.approx(SLOTS, abs=0.4 if per_layer else 1e-9)
    logits = next_logits(model, cache, torch.tensor([more]))[0]
    # transformers' eager attention has its softmax in float32, whatever the model's type.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    if "Merging" not in specification:  # which makes new values
        found = slots_of(cache, prefilled)
        assert found == slots_by_hand(kept, masks, prefilled)
        assert all(slots == sorted(slots) for slots in found)


@pytest.mark.kvpress
def test_heads_of_adakv_are_truly_shorter():
    """kvpress keeps all slots and hides some behind fake keys; here they are gone, and so are their bytes."""
    model = small_model("llama")
    prefilled = prefill(model, [tokens(T)])
    cache = make("adakv:press=KnormPress").compress(prefilled, Budget(tokens=SLOTS))
    counts = torch.stack([layer.slots_BG for layer in cache.layers])
    assert counts.double().mean(-1).flatten().tolist() == [SLOTS] * 3  # shared within a layer
    assert len(set(counts.flatten().tolist())) > 1
    assert cache.nbytes == prefilled.cache.nbytes * SLOTS // T
    assert max(layer.bias_BGS.shape[2] for layer in cache.layers) == counts.max()


@pytest.mark.kvpress
@pytest.mark.parametrize("length", [50, 64, 97])
def test_every_budget_is_met_to_the_slot(length):
    """kvpress truncates: 0.9 removed of 768 leaves 76, and 1 − 0.9 is a little less than 0.1."""
    model = small_model("llama", num_hidden_layers=2)
    prefilled = prefill(model, [tokens(length)])
    for slots in range(1, length):
        assert make("knorm").compress(prefilled, Budget(tokens=slots)).slots == slots
        if slots % 7 == 1:
            assert make("adakv:press=KnormPress").compress(prefilled, Budget(tokens=slots)).slots == slots
    assert make("knorm").compress(prefilled, Budget(keep_fraction=0.1)).slots == length // 10


@pytest.mark.kvpress
def test_budgets_that_a_press_cannot_meet_are_told():
    prefilled = prefill(small_model("llama"), [tokens(T)])
    with pytest.warns(UserWarning, match="asked to keep 37 slots, kept 20.0"):
        cache = make("kvpress.ChunkKVPress:press=KnormPress").compress(prefilled, Budget(tokens=37))
    assert cache.slots == 20


@pytest.mark.kvpress
def test_rerotated_keys_go_on_where_they_end():
    model = small_model("llama", dtype=torch.float64)
    text = tokens(T + MORE)
    k = kvpress()
    press = k.KeyRerotationPress(press=k.KnormPress(compression_ratio=1 - (SLOTS + 0.001) / T))
    expected, _, _ = by_hand(model, press, text[:T], text[T:], position=SLOTS)
    cache = make("kvpress.KeyRerotationPress:press=KnormPress").compress(
        prefill(model, [text[:T]]), Budget(tokens=SLOTS)
    )
    logits = next_logits(model, cache, torch.tensor([text[T:]]))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-8)


@pytest.mark.kvpress
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_unequal_length_and_other_dtypes(dtype):
    model = small_model("llama", dtype=dtype)
    rows = [tokens(90, 1), tokens(60, 2)]
    both = compress(model, rows, make("h2o"), Budget(keep_fraction=0.25)).cache
    for b, row in enumerate(rows):
        alone = compress(model, [row], make("h2o"), Budget(keep_fraction=0.25)).cache
        assert alone.slots == len(row) // 4
        for one, layer in zip(alone.layers, both.row(b).layers, strict=True):
            torch.testing.assert_close(layer.bias_BGS, one.bias_BGS)
            if dtype == torch.float32:
                torch.testing.assert_close(layer.keys_BGSD, one.keys_BGSD, rtol=1e-4, atol=1e-4)


@pytest.mark.kvpress
def test_the_whole_budget_changes_nothing():
    model = small_model("llama")
    text = tokens(T + MORE)
    prefilled = prefill(model, [text[:T]])
    more = torch.tensor([text[T:]])
    cache = make("adakv").compress(prefilled, Budget(keep_fraction=1))
    assert torch.equal(next_logits(model, cache, more), next_logits(model, prefilled.cache, more))
    almost = make("adakv:press=KnormPress").compress(prefilled, Budget(tokens=T - 1))
    assert almost.slots == T - 1


@pytest.mark.kvpress
def test_stacks_with_quantisation():
    model = small_model("llama")
    cache = compress(model, [tokens(T)], make("snapkv:window_size=8+int8"), Budget(tokens=SLOTS)).cache
    plain_cache = compress(model, [tokens(T)], make("snapkv:window_size=8"), Budget(tokens=SLOTS)).cache
    assert cache.slots == SLOTS and cache.nbytes < plain_cache.nbytes


@pytest.mark.kvpress
@pytest.mark.parametrize("specification", ["h2o", "adakv:press=KnormPress", "knorm", "snapkv"])
def test_the_model_is_left_as_it_was(specification):
    model = small_model("llama")
    model.config._attn_implementation = "eager"  # which AdaKV refuses: the adapter sees to it
    ids = torch.tensor([tokens(T)])
    before = model(ids).logits
    attributes = [set(vars(layer.self_attn)) | set(layer.self_attn._modules) for layer in model.model.layers]
    make(specification).compress(prefill(model, [tokens(T)]), Budget(tokens=100))
    with pytest.raises(ValueError, match="kvpress"):
        make("snapkv:window_size=200").compress(prefill(model, [tokens(T)]), Budget(tokens=100))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, before)
    after = [set(vars(layer.self_attn)) | set(layer.self_attn._modules) for layer in model.model.layers]
    assert after == attributes and "forward" not in vars(model.model)


@pytest.mark.kvpress
def test_kvpress_wraps_our_attention_without_harm(monkeypatch):
    """Its import wraps every attention function that is registered, and hands `dropout` on by place."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = small_model("llama")
    logits = prefill(model, [tokens(T)]).logits_BV
    wrapped = kvpress().attention_patch.attention_patch(_attention)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, wrapped)
    assert torch.equal(prefill(model, [tokens(T)]).logits_BV, logits)


@pytest.mark.kvpress
def test_a_window_as_large_as_the_budget_is_told():
    """SnapKV's default window of 64 tokens: at 37 slots nothing but the window is left, the sinks are gone."""
    prefilled = prefill(small_model("llama"), [tokens(T)])
    with pytest.warns(UserWarning, match="window of 64 last tokens .* window_size=18"):
        cache = make("snapkv").compress(prefilled, Budget(tokens=SLOTS))
    assert min(min(slots) for slots in slots_of(cache, prefilled)) >= T - 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = make("snapkv:window_size=18").compress(prefilled, Budget(tokens=SLOTS))
    assert min(min(slots) for slots in slots_of(cache, prefilled)) < T - 64


def tokenizer_folder(folder, template=None):
    """A tokenizer of single bytes, as KVzip loads it from the model's folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


@pytest.mark.kvpress
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("begins", ["plain", "template"])
def test_kvzip_equals_kvpress_by_hand_and_is_told_where_the_text_begins(tmp_path, begins, layerwise):
    """Given a template, KVzip takes the context's first tokens for its prefix: unscored, they would be dropped."""
    model = small_model("llama", vocab_size=256)  # float32: KVzip's mask overflows in float64
    with_template = tokenizer_folder(tmp_path / "template", TEMPLATE)
    tokenizer_folder(tmp_path / "none")
    prefix = with_template.encode("SYSTEM SAYS BE KIND. USER: ")
    ids, more = tokens(T), tokens(MORE, 9)
    if begins == "template":
        ids = (prefix + ids)[:T]
    press = kvpress().KVzipPress(compression_ratio=1 - (SLOTS - 0.001) / T, layerwise=layerwise)
    model.config.name_or_path = str(tmp_path / ("template" if begins == "template" else "none"))
    expected, kept, masks = by_hand(model, press, ids, more)

    model.config.name_or_path = str(tmp_path / "template")
    prefilled = prefill(model, [ids])
    cache = make(f"kvzip:layerwise={layerwise}").compress(prefilled, Budget(tokens=SLOTS))
    assert cache.slots == SLOTS
    per_layer = {float(layer.slots_BG.double().mean()) for layer in cache.layers}
    assert per_layer == {SLOTS} if layerwise else len(per_layer) > 1  # shared over layers
    assert slots_of(cache, prefilled) == slots_by_hand(kept, masks, prefilled)
    logits = next_logits(model, cache, torch.tensor([more]))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    if begins == "plain":  # the trap: by hand with the template, the text's beginning is dropped
        _, kept, masks = by_hand(model, press, ids, more)
        for slots in slots_by_hand(kept, masks, prefilled):
            assert not set(slots) & set(range(4, len(prefix)))
        assert any(set(slots) & set(range(4, len(prefix))) for slots in slots_of(cache, prefilled))


@pytest.mark.kvpress
def test_kvzip_reads_a_context_again_only_where_the_model_does(tmp_path):
    model = small_model("llama", vocab_size=256)
    tokenizer_folder(tmp_path)
    model.config.name_or_path = str(tmp_path)
    prefilled = prefill(model, [tokens(300)])
    with pytest.raises(ValueError, match=r"kvzip of 6\d\d tokens: the model reads 512 .*shorten the context"):
        make("kvzip").compress(prefilled, Budget(tokens=SLOTS))
    make("expected-attention").compress(
        prefilled, Budget(tokens=SLOTS)
    )  # which asks for positions far behind


@pytest.mark.kvpress
def test_kvzip_without_a_tokenizer_says_so(tmp_path):
    model = small_model("llama")
    model.config.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="needs the tokenizer in the model's folder"):
        make("kvzip").compress(prefill(model, [tokens(T)]), Budget(tokens=SLOTS))


@pytest.mark.kvpress
@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ("kvpress.NoSuchPress", "kvpress has no NoSuchPress; it has AdaKVPress"),
        ("kvpress.ScorerPress", "what presses are made from"),
        ("snapkv:windw=3", "windw is not a setting of SnapKVPress; it has kernel_size=…, window_size=…"),
        ("snapkv:compression_ratio=0.5", "compression_ratio is not a setting"),
        ("adakv:press=KnormPress:window_size=3", "window_size is not a setting of KnormPress"),
        ("adakv:press=ObservedAttentionPress", "refuses eager attention"),
        ("adakv:alpha_safeguard=3", "refused its settings"),
        ("kvpress.ChunkPress", "works on another press"),
        ("kvpress.DecodingPress:base_press=KnormPress", "while text is generated"),
        ("kvpress.ThinKPress", "cannot be given a budget"),
        ("kvpress.DuoAttentionPress", "cannot be given a budget"),
        ("kvpress.ComposedPress", "refused its settings|cannot be given"),
        ("kvpress.FinchPress", "needs the question"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(specification, message):
    with pytest.raises(ValueError, match=message):
        make(specification)


@pytest.mark.kvpress
@pytest.mark.parametrize("specification", [*CASES, "snapkv", "adakv", "kvzip:n_sink=2"])
def test_specifications_survive_the_round_trip(specification):
    compressor = make(specification)
    assert make(str(compressor)) == compressor
    assert compressor.settings["press"].startswith("kvpress.") or "press" in compressor.arguments
    assert str(compressor) == specification


def test_where_kvpress_is_missing_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ValueError, match=r"kvpress is missing: pip install 'kvcat-nemo\[kvpress\]'"):
        make("snapkv")


@pytest.mark.kvpress
@pytest.mark.slow
@pytest.mark.skipif(
    not (SMOLLM2 / "model.safetensors").exists(), reason=f"no {SMOLLM2}: make quickstart gets it"
)
@pytest.mark.parametrize("specification", ["h2o", "expected-attention", "adakv:press=ExpectedAttentionPress"])
def test_smollm2_equals_kvpress_by_hand(specification):
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    text = torch.randint(model.config.vocab_size, (232,), generator=torch.Generator().manual_seed(0)).tolist()
    ids, more = text[:224], text[224:]
    press = CASES[specification](kvpress(), 1 - (22 + 0.001) / 224)
    expected, kept, masks = by_hand(
        model, press, ids, more, attention="eager" if specification == "h2o" else "sdpa"
    )
    prefilled = prefill(model, [ids])
    cache = make(specification).compress(prefilled, Budget(keep_fraction=0.1))
    assert cache.slots == 22
    assert slots_of(cache, prefilled) == slots_by_hand(kept, masks, prefilled)
    logits = next_logits(model, cache, torch.tensor([more]))[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
