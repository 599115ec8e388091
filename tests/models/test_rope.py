"""Inverse frequencies against transformers' own functions, and the derived bound of what float32 can do to them."""

import pytest
import torch

from kvcat_nemo.models.frequencies import float32_error, inverse_frequencies
from kvcat_nemo.models.function import differences, function_of_settings, rope_of_settings
from kvcat_nemo.models.rope import DEFAULT_THETA, Rope, read_rope
from tests.models.tiny_models import ROPES, THETA, native


def _library(rope, theta_form):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, **theta_form)
    module = LlamaRotaryEmbedding(config)
    return module.inv_freq.double(), module.attention_scaling


@pytest.mark.parametrize(
    "rope",
    [
        *ROPES.values(),
        {"rope_type": "linear", "factor": 0.5},
        ROPES["llama3"] | {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        ROPES["yarn"] | {"mscale": 1.0, "mscale_all_dim": 0.7},
        ROPES["yarn"] | {"attention_factor": 1.25, "truncate": False},
        ROPES["yarn"] | {"beta_fast": 32.0, "beta_slow": 2.0, "original_max_position_embeddings": 4096},
    ],
    ids=lambda r: "-".join(map(str, r.values())),
)  # fmt: skip
def test_frequencies_are_the_librarys(rope):
    read = read_rope({"rope_parameters": rope | {"rope_theta": THETA}, "max_position_embeddings": 131072})
    theirs, scaling = _library(rope, native(rope))
    bound = float32_error(read.theta, read.scaling)
    for dtype in (torch.float32, torch.float64):
        ours = inverse_frequencies(64, read.theta, read.scaling, dtype).double()
        assert (ours / theirs - 1).abs().max() <= bound < 1e-3
    assert scaling == pytest.approx(read.attention_scaling, rel=1e-12)
    # Written out in full, it is read as the same rope again.
    assert read_rope({"rope_parameters": read.parameters()}) == read


def test_no_rope_field_means_the_classes_default():
    assert read_rope({}) == Rope(DEFAULT_THETA)


@pytest.mark.parametrize(
    ("settings", "rope"),
    [
        ({"rotary_base": 10000}, {}),
        ({"rotary_base": 10000, "seq_len_interpolation_factor": 1.0}, {}),
        ({"rotary_base": 10000, "seq_len_interpolation_factor": 4.0}, ROPES["linear"]),
        ({"rotary_base": 10000, "rope_scaling": {"type": "linear", "factor": 4}}, ROPES["linear"]),
        (
            {"rotary_base": 10000, "scale_factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "old_context_len": 32},
            ROPES["llama3"],
        ),
        ({"rotary_base": 10000, "scale_factor": 8.0, "rope_scaling": {"rope_type": "default"}}, {}),
    ],
)  # fmt: skip
def test_megatrons_settings_mean_the_same_rope(settings, rope):
    described = rope_of_settings(settings)
    assert described == read_rope({"rope_theta": 10000.0, "rope_scaling": rope or None})
    function = function_of_settings(settings)
    assert not differences(
        function, function_of_settings({"rotary_base": 10000.0, "rope_scaling": rope or None})
    )


def test_two_ways_to_stretch_the_context_are_refused():
    with pytest.raises(
        ValueError, match="seq_len_interpolation_factor=4.0: the rope is of kind 'linear' already"
    ):
        rope_of_settings(
            {"rotary_base": 10000, "seq_len_interpolation_factor": 4.0, "rope_scaling": ROPES["linear"]}
        )
