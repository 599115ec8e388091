"""Export compares what was trained with the config.json that would go with it (for verify: test_verify.py)."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from kvcat_nemo.conversion.exporting import export_hf
from kvcat_nemo.models.function import function_of_model, stored_function, write_record
from kvcat_nemo.models.hf_config import read_model
from kvcat_nemo.runs.layout import RECORD
from tests.conversion.conversion_models import build, edit_config, same_bits, tensors_of

LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A model with linear rope, and an imported folder of it."""
    from kvcat_nemo.conversion.importing import import_hf

    root = tmp_path_factory.mktemp("linear")
    hf = build("llama2", root / "hf", rope_scaling=LINEAR)
    return hf, import_hf(hf, root / "imported")


@pytest.fixture
def run(linear, tmp_path):
    """A run's folder with one checkpoint, as NeMo lays it out, that says nothing of its function yet."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step=3"
    shutil.copytree(linear[1] / "weights", checkpoint / "weights")
    return tmp_path / "run"


def _record(run, **changes):
    function = function_of_model(read_model(run.parent / "base")) | changes
    write_record(run / "checkpoints" / "step=3", json.loads(json.dumps(function)))


def _old(run, **changes):
    """What a run from before there were records kept: Megatron's settings, without callables."""
    settings = {
        "num_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "kv_channels": None,
        "softmax_scale": None,
        "vocab_size": 128,
        "rotary_base": 10000.0,
        "rotary_percent": 1.0,
        "layernorm_epsilon": 1e-6,
        "seq_len_interpolation_factor": 4.0,
    }
    (run / "kvcat").mkdir()
    (run / "kvcat" / "config.json").write_text(json.dumps({"model": settings | changes}))


def _nothing(run, **changes):
    assert not changes


SAID = {"a record": _record, "an older run's settings": _old, "nothing": _nothing}


@pytest.fixture
def base(linear, run):
    return Path(shutil.copytree(linear[0], run.parent / "base"))


@pytest.mark.parametrize("said", SAID)
def test_a_base_that_agrees_is_exported(run, base, said, tmp_path):
    SAID[said](run)
    out = export_hf(run, tmp_path / "out", base=base, unverified=True)
    assert read_model(out) == read_model(base)
    exported, original = tensors_of(out), tensors_of(base)
    assert exported.keys() == original.keys()
    assert all(same_bits(exported[name], original[name]) for name in original)


@pytest.mark.parametrize("said", ["a record", "an older run's settings"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rope_scaling", {"rope_scaling": None}),
        ("rope_scaling", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("rotary_base", {"rope_theta": 20000.0}),
        ("layernorm_epsilon", {"rms_norm_eps": 1e-5}),
    ],
)
def test_a_base_of_another_function_is_refused(run, base, said, name, change, tmp_path):
    SAID[said](run)
    edit_config(base, **change)
    with pytest.raises(ValueError, match=rf"{name} is .* in .* and .* in .*config.json.*--base"):
        export_hf(run, tmp_path / "out", base=base, unverified=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "trained",
    [
        {"rotary_percent": 0.5},
        {"rotary_interleaved": True},
        {"softmax_scale": 0.5},
        {"position_embedding_type": "learned_absolute"},
        {"activation_func": "gelu"},
        {"vocab_size": 120},
    ],
    ids=lambda t: next(iter(t)),
)
def test_a_function_that_config_json_cannot_say_is_refused(run, base, trained, tmp_path):
    _record(run, **trained)
    with pytest.raises(ValueError, match=rf"{next(iter(trained))} is .*exported with this base"):
        export_hf(run, tmp_path / "out", base=base, unverified=True)


@pytest.mark.parametrize("rope", [None, LINEAR], ids=["plain", "linear"])
def test_the_export_of_a_base_of_transformers_5_is_read_right_by_4(tmp_path, rope):
    """By transformers itself, whichever version: the export has both forms of the rope."""
    from transformers import AutoModelForCausalLM

    from kvcat_nemo.conversion.importing import import_hf

    hf = build("llama2", tmp_path / "hf", rope_scaling=rope, rope_theta=500000.0)
    ids = torch.arange(100)[None]
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(hf)(ids).logits
    new = (rope or {"rope_type": "default"}) | {"rope_theta": 500000.0}
    edit_config(hf, rope_theta="remove", rope_scaling="remove", rope_parameters=new)
    out = export_hf(import_hf(hf, tmp_path / "imported"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out)(ids).logits, wanted)
    assert read_model(out) == read_model(hf)


def test_a_damaged_record_is_refused(run, base, tmp_path):
    (run / "checkpoints" / "step=3" / RECORD).write_text('{"function": 3}')
    with pytest.raises(ValueError, match="kvcat_model.json is damaged"):
        export_hf(run, tmp_path / "out", base=base, unverified=True)


def test_an_imported_folder_says_what_it_is_itself(linear, base, tmp_path):
    function, file = stored_function(linear[1] / "weights")
    assert file == linear[1] / "hf" / "config.json" and function["rope_scaling"]["factor"] == 4.0
    edit_config(base, rope_scaling=None)
    with pytest.raises(ValueError, match="rope_scaling is .*4.0.* and None in"):
        export_hf(linear[1], tmp_path / "out", base=base)
