"""A new model family is one entry of one table. Files touched: kvcat_nemo/models/families.py, and this test."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kvcat_nemo.models.families import FAMILIES, Family
from kvcat_nemo.models.hf_config import read_model
from tests.models.tiny_models import SIZES, THETA, native
from tests.support.hf_models import byte_tokenizer

ROOT = Path(__file__).parents[2]


class ToyConfig(Qwen2Config):
    model_type = "toy"


class ToyForCausalLM(Qwen2ForCausalLM):
    config_class = ToyConfig


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The entry, and a small model of the family in a folder; the family's class is transformers' own business."""
    monkeypatch.setitem(FAMILIES, "toy", Family("ToyForCausalLM", kv_heads=32, qkv_bias=True, windows="some"))
    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
    torch.manual_seed(0)
    model = ToyForCausalLM(ToyConfig(**SIZES, **native({"rope_type": "default"})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(tmp_path / "toy")
    byte_tokenizer().save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def test_it_is_read_loaded_compressed_and_asked(toy):
    from kvcat_nemo.compress import Budget, compress, generate, make
    from kvcat_nemo.evaluate.models import load_model

    assert read_model(toy).family == "toy" and read_model(toy).rope.theta == THETA
    model, tokenizer, facts = load_model(toy)
    assert type(model).__name__ == "ToyForCausalLM" and facts.name == "toy"
    ids = tokenizer("a text of the toy family, of some length")["input_ids"]
    whole = generate(
        model,
        compress(model, [ids], make("recent"), Budget(keep_fraction=1.0)).cache,
        [65, 66],
        max_new_tokens=4,
    )
    expected = model.generate(
        torch.tensor([[*ids, 65, 66]]), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert whole == expected[0, len(ids) + 2 :].tolist()


@pytest.mark.slow
def test_it_goes_to_megatron_and_back(toy, tmp_path):
    pytest.importorskip("megatron.core", reason="conversion needs Megatron-core")
    from safetensors.torch import load_file

    from kvcat_nemo.conversion.exporting import export_hf
    from kvcat_nemo.conversion.importing import import_hf

    export_hf(import_hf(toy, tmp_path / "imported"), tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (toy, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(name.endswith("q_proj.bias") for name in after)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "toy"


def test_no_other_module_names_a_family():
    names = re.compile("|".join(f"[\"']{name}[\"']" for name in FAMILIES))
    files = [f for folder in ("kvcat_nemo", "conversion") for f in (ROOT / folder).rglob("*.py")]
    found = {f.relative_to(ROOT).as_posix() for f in files if names.search(f.read_text(encoding="utf-8"))}
    assert found == {"kvcat_nemo/models/families.py"}
