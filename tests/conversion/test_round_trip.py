"""Hugging Face → Megatron → Hugging Face gives the same bits; the pieces on the way are what they claim."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kvcat_nemo.conversion.arch import from_hf_config, load_architecture
from kvcat_nemo.conversion.exporting import export_hf, is_router_key
from kvcat_nemo.conversion.importing import import_hf
from kvcat_nemo.conversion.weight_map import from_groups, hf_shapes, num_parameters, to_groups
from kvcat_nemo.models.frequencies import inverse_frequencies
from kvcat_nemo.models.rope import RopeScaling
from kvcat_nemo.runs.vocabulary import padded
from tests.conversion.conversion_models import CONFIGS, LLAMA3_ROPE, build, edit_config, same_bits, tensors_of


def assert_same_tensors(left, right):
    left, right = tensors_of(left), tensors_of(right)
    assert left.keys() == right.keys()
    assert [name for name in left if not same_bits(left[name], right[name])] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact_and_loads_with_transformers(name, hf_models, imported, tmp_path):
    from transformers import AutoModelForCausalLM

    out = export_hf(imported[name], tmp_path / "out")
    assert_same_tensors(hf_models[name], out)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        model.config.to_diff_dict()
        == AutoModelForCausalLM.from_pretrained(hf_models[name]).config.to_diff_dict()
    )


def test_bfloat16_shards_go_in_and_out(tmp_path):
    source = build("qwen2-untied", tmp_path / "hf", torch.bfloat16)
    sharded = tmp_path / "sharded"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    out = export_hf(import_hf(sharded, tmp_path / "mid"), tmp_path / "out", max_shard_size=30_000)
    assert_same_tensors(source, out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: f.name for f in out.glob("*.safetensors") for name in load_file(f)}
    assert index["weight_map"] == held and len(set(held.values())) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_dtype_option_casts_and_says_so(hf_models, tmp_path):
    mid = import_hf(hf_models["qwen2-tied"], tmp_path / "mid", dtype="bfloat16")
    assert json.loads((mid / "kvcat_checkpoint.json").read_text())["dtype"] == "bfloat16"
    out = export_hf(mid, tmp_path / "out")
    theirs = tensors_of(hf_models["qwen2-tied"])
    for name, tensor in tensors_of(out).items():
        assert same_bits(tensor, theirs[name].bfloat16()), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_card_and_sidecars(copy_of, tmp_path):
    source = copy_of("llama3")
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    out = import_hf(source, tmp_path / "out")
    card = json.loads((out / "kvcat_checkpoint.json").read_text())
    assert card["architecture"]["rope_scaling"]["high_freq_factor"] == LLAMA3_ROPE["high_freq_factor"]
    assert (out / "hf" / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert load_architecture(out) == load_architecture(source)
    exported = export_hf(out, tmp_path / "exported")
    assert (exported / "tokenizer_config.json").is_file() and (exported / "generation_config.json").is_file()
    # The fingerprint is of the content: another bit gives another one.
    again = import_hf(source, tmp_path / "again")
    assert json.loads((again / "kvcat_checkpoint.json").read_text())["source"] == card["source"]
    tensors = tensors_of(source)
    tensors["model.norm.weight"][0] += 1
    from safetensors.torch import save_file

    save_file(tensors, source / "model.safetensors")
    changed = import_hf(source, tmp_path / "changed")
    fingerprint = json.loads((changed / "kvcat_checkpoint.json").read_text())["source"]["fingerprint"]
    assert fingerprint != card["source"]["fingerprint"]


def test_tied_model_may_hold_an_equal_output_layer(copy_of, tmp_path):
    from safetensors.torch import save_file

    source = copy_of("qwen2-tied")
    tensors = tensors_of(source)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        source / "model.safetensors",
    )
    out = export_hf(import_hf(source, tmp_path / "mid"), tmp_path / "out")
    assert set(tensors_of(out)) == set(tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_map_names_and_shapes_are_those_of_transformers(name, hf_models):
    arch = load_architecture(hf_models[name])
    theirs = {k: tuple(v.shape) for k, v in tensors_of(hf_models[name]).items()}
    assert hf_shapes(arch) == theirs
    assert num_parameters(arch) == sum(torch.Size(s).numel() for s in theirs.values())


def test_groups_interleave_as_megatron_splits_them(hf_models):
    arch = load_architecture(hf_models["llama3"])
    g, d, per_group = (
        arch.num_query_groups,
        arch.kv_channels,
        arch.num_attention_heads // arch.num_query_groups,
    )
    # Each row is named: (kind, head, channel).
    parts = [
        torch.tensor([[kind, head, c] for head in range(heads) for c in range(d)])
        for kind, heads in ((0, arch.num_attention_heads), (1, g), (2, g))
    ]
    fused = to_groups(lambda i: parts[i], arch)
    expected = []
    for group in range(g):
        heads = [(0, group * per_group + i) for i in range(per_group)] + [(1, group), (2, group)]
        expected += [[kind, head, c] for kind, head in heads for c in range(d)]
    assert fused.tolist() == expected
    for part, back in zip(parts, from_groups(fused, arch), strict=True):
        assert torch.equal(part, back)


@pytest.mark.parametrize("factors", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 2.0, 8.0, 32)])
def test_llama3_frequencies_equal_transformers(factors):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factor, low, high, original = factors
    rope = dict(
        rope_type="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
    config = LlamaConfig(rope_theta=500000.0, head_dim=128, rope_scaling=rope, max_position_embeddings=131072)
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    ours = inverse_frequencies(128, 500000.0, RopeScaling("llama3", factor, low, high, original))
    assert attention_factor == 1.0
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, inverse_frequencies(128, 500000.0, None))


def test_rope_parameters_of_newer_configs_mean_the_same(copy_of):
    source = copy_of("llama3")
    arch = load_architecture(source)
    edit_config(
        source,
        rope_scaling="remove",
        rope_theta="remove",
        rope_parameters=LLAMA3_ROPE | {"rope_theta": arch.rotary_base},
    )
    assert load_architecture(source) == arch


def test_real_configs():
    qwen = from_hf_config(
        dict(
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
            hidden_size=1536,
            intermediate_size=8960,
            num_attention_heads=12,
            num_key_value_heads=2,
            num_hidden_layers=28,
            vocab_size=151936,
            max_position_embeddings=131072,
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
            sliding_window=131072,
            use_sliding_window=False,
            tie_word_embeddings=True,
        )
    )
    assert num_parameters(qwen) == 1_543_714_304  # Qwen2.5-1.5B as published
    assert qwen.qkv_bias and not qwen.qk_norm and qwen.tied and qwen.kv_channels == 128


def test_padded_vocab_size():
    assert padded(131, 2, 1) == 132 and padded(128, 2, 1) == 128
    assert padded(151936, 4, 128) == 152064


def test_router_keys():
    routers = [
        "decoder.layers.router.weight",
        "decoder.layers.3.self_attention.router.q",
        "decoder.routers.0.w",
    ]
    assert all(map(is_router_key, routers))
    assert not is_router_key("decoder.layers.mlp.linear_fc1.weight") and not is_router_key("decoder.router_x")
