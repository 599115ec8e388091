"""Model folders: loaded whole or refused, before any work."""

import json

import pytest
import torch

from kvcat_nemo.evaluate.models import find_model, find_models, load_model, weights_fingerprint
from tests.support.hf_models import save_model


def test_a_model_is_loaded_with_its_facts(model_dir, other_model_dir):
    model, tokenizer, facts = load_model(model_dir, "bfloat16", "cpu")
    assert next(model.parameters()).dtype == torch.bfloat16 and not model.training
    assert tokenizer.decode(tokenizer("plain words")["input_ids"]) == "plain words"
    assert facts.name == "tiny" and facts.path == str(model_dir)
    _, _, other = load_model(f"mine={other_model_dir}")
    assert other.name == "mine"
    assert other.fingerprint != facts.fingerprint and other.tokenizer == facts.tokenizer


def test_fingerprint_is_of_weights_and_settings(tmp_path, model_dir):
    again = save_model(tmp_path / "again")
    fingerprint = weights_fingerprint(find_model(model_dir))
    assert weights_fingerprint(find_model(again)) == fingerprint
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert weights_fingerprint(find_model(again)) == fingerprint
    (again / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert weights_fingerprint(find_model(again)) != fingerprint


def test_folders_that_are_no_models_are_refused(tmp_path, model_dir):
    with pytest.raises(ValueError, match="no such folder"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config\.json"):
        find_model(tmp_path)
    (tmp_path / "run" / "weights").mkdir(parents=True)
    with pytest.raises(ValueError, match="export it first: kvcat export"):
        find_model(tmp_path / "run")
    with pytest.raises(ValueError, match="two are called 'tiny'"):
        find_models([str(model_dir), str(model_dir)])
    assert [x.name for x in find_models([str(model_dir), f"b={model_dir}"])] == ["tiny", "b"]
    with pytest.raises(ValueError, match="at least one"):
        find_models([])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "model_type='gpt2'"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing .*fetch"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"pickled weights \(pytorch_model\.bin\).*convert them to safetensors",
        ),
        (lambda f: _cut(f / "model.safetensors", -1), "is truncated.*not fully covered"),
        (lambda f: _cut(f / "model.safetensors", 20), "not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "not a safetensors file"),
        (lambda f: [x.unlink() for x in f.glob("tokenizer*")], "no tokenizer there"),
    ],
)
def test_damaged_folders_are_refused_without_loading(tmp_path, damage, message):
    folder = save_model(tmp_path / "damaged")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        find_model(folder)


def test_a_missing_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*model\.norm\.weight"):
        load_model(folder)
    with pytest.raises(ValueError, match="dtype='int8'"):
        load_model(folder, "int8")
    with pytest.raises(ValueError, match="device='tpu'"):
        from kvcat_nemo.evaluate.models import choose_device

        choose_device("tpu")


def _cut(path, size):
    path.write_bytes(path.read_bytes()[:size])
