"""What transformers built is compared value by value: every one of them, put wrong, is found and named."""

import pytest
import torch
from torch import nn

from kvcat_nemo.models.hf_config import read_model
from kvcat_nemo.models.load import check_loaded, load_causal_lm
from tests.models.tiny_models import make


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def _set(path, value):
    def change(model):
        *owners, name = path.split(".")
        owner = model
        for part in owners:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        setattr(owner, name, value(getattr(owner, name)) if callable(value) else value)

    return change


def _untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


LAYER = "model.layers.1"
WRONG = {
    "frequencies": (_set("model.rotary_emb.inv_freq", lambda f: f * 1.001), "rope's frequencies are off"),
    "one frequency": (_set("model.rotary_emb.inv_freq", lambda f: torch.cat([f[:-1], f[-1:] / 2])), "by a factor of up to 1.5"),
    "a frequency that is no number": (_set("model.rotary_emb.inv_freq", lambda f: f * float("nan")), "frequencies are off"),
    "too few frequencies": (_set("model.rotary_emb.inv_freq", lambda f: f[:-1]), "15 rotary frequencies"),
    "attention scaling": (_set("model.rotary_emb.attention_scaling", 1.1), "attention_scaling is 1.1"),
    "kind of rope": (_set("model.rotary_emb.rope_type", "dynamic"), "rope_type is 'dynamic'"),
    "eps of the last norm": (_set("model.norm.variance_epsilon", 1e-6), "rms_norm_eps of norm is 1e-06"),
    "eps in a layer": (_set(f"{LAYER}.input_layernorm.variance_epsilon", 1e-6), "layer 1: rms_norm_eps is 1e-06"),
    "eps of a query norm": (_set(f"{LAYER}.self_attn.q_norm.variance_epsilon", 1e-6), "layer 1: rms_norm_eps"),
    "softmax scale": (_set(f"{LAYER}.self_attn.scaling", 0.5), "layer 1: softmax scale is 0.5"),
    "head_dim": (_set(f"{LAYER}.self_attn.head_dim", 16), "layer 1: head_dim is 16"),
    "KV heads": (_set(f"{LAYER}.self_attn.num_key_value_groups", 4), "query heads per KV head is 4"),
    "activation": (_set(f"{LAYER}.mlp.act_fn", lambda _: nn.GELU()), "layer 1: hidden_act"),
    "a bias": (_set(f"{LAYER}.self_attn.q_proj.bias", nn.Parameter(torch.ones(128))), "layer 1: attention_bias"),
    "an MLP bias": (_set(f"{LAYER}.mlp.up_proj.bias", nn.Parameter(torch.ones(96))), "layer 1: mlp_bias"),
    "a window": (lambda m: (setattr(m.config, "sliding_window", 8), setattr(m.config, "layer_types", ["sliding_attention"] * 2)), "sliding_window is 8"),
    "a layer less": (_set("model.layers", lambda layers: layers[:1]), "num_hidden_layers is 1"),
    "untied": (_untie, "tie_word_embeddings is False"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named(root, tmp_path, name):
    change, message = WRONG[name]
    folder, _ = make(root, tmp_path / "model", family="Qwen3", tied=True)
    model, described = load_causal_lm(folder), read_model(folder)
    check_loaded(model, described, "here")
    change(model)
    with pytest.raises(ValueError, match=message):
        check_loaded(model, described, "here")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_compressors_refuse_a_rope_that_changes_with_the_length(root, tmp_path, kind):
    """Of a model that was loaded by other means; from a folder it is refused earlier."""
    from kvcat_nemo.compress.hf_attention import check_model

    model = load_causal_lm(make(root, tmp_path / "model")[0])
    check_model(model)
    model.model.rotary_emb.rope_type = kind
    with pytest.raises(ValueError, match=f"rope_type='{kind}'"):
        check_model(model)
