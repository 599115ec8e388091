"""What cannot be carried over faithfully is refused by name, and nothing is left behind."""

import json
import os
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from kvcat_nemo.cli import main
from kvcat_nemo.conversion.arch import load_architecture
from kvcat_nemo.conversion.dist_checkpoint import CheckpointReader
from kvcat_nemo.conversion.exporting import export_hf, model_prefix
from kvcat_nemo.conversion.importing import import_hf
from kvcat_nemo.conversion.layout import check_layout
from kvcat_nemo.runs.layout import MANIFEST
from tests.conversion.conversion_models import edit_config, tensors_of


def _edit(folder, change):
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _set(name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return lambda folder: _edit(folder, change)


def _truncate(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def _grow(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def _pickle_instead(folder):
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _index(weight_map):
    def change(folder):
        held = {name: "model.safetensors" for name in tensors_of(folder)}
        text = json.dumps({"weight_map": held | weight_map})
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def _config(**changes):
    return lambda folder: edit_config(folder, **changes)


_NORM = "model.norm.weight"
REFUSED = {
    "unknown architecture": ("llama2", _config(architectures=["GemmaForCausalLM"]), "unknown architecture.*Gemma"),
    "unknown model type": ("llama2", _config(model_type="mixtral"), "unknown architecture.*mixtral"),
    "yarn": ("qwen2-tied", _config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope_type is 'yarn'"),
    "dynamic": ("llama2", _config(rope_scaling={"type": "dynamic", "factor": 4.0}), "rope_type is 'dynamic'"),
    "llama3 factor": ("llama2", _config(rope_scaling={"type": "llama3", "factor": 4.0}), "lacks low_freq_factor"),
    "partial rotary": ("llama2", _config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "attention bias": ("llama2", _config(attention_bias=True), "attention_bias is True"),
    "qwen3 bias": ("qwen3", _config(attention_bias=True), "attention_bias is True"),
    "mlp bias": ("llama2", _config(mlp_bias=True), "mlp_bias is True"),
    "activation": ("llama2", _config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "sliding window": ("qwen2-tied", _config(use_sliding_window=True), "use_sliding_window is True"),
    "layer types": ("qwen3", _config(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    "quantized": ("llama2", _config(quantization_config={"bits": 4}), "quantization_config"),
    "no field": ("llama2", _config(intermediate_size="remove"), "intermediate_size is missing"),
    "uneven groups": ("llama2", _config(num_key_value_heads=3), "not a multiple of num_key_value_heads 3"),
    "missing": ("llama2", lambda f: _edit(f, lambda t: t.pop(_NORM)), f"lacks tensors: {_NORM}"),
    "extra": ("llama2", lambda f: _edit(f, lambda t: t.update(x=torch.ones(1))), "unknown tensors: x"),
    "more layers": ("llama2", _config(num_hidden_layers=1), "unknown tensors: model.layers.1.* and 6 more"),
    "shape": ("llama2", _config(vocab_size=120), r"embed_tokens.weight has shape \[128, 64\].*\[120, 64\]"),
    "head dim": ("llama3", _config(head_dim=16), r"q_proj.weight has shape \[128, 64\]"),
    "nan": ("llama2", _set(_NORM, float("nan")), f"{_NORM} holds NaN"),
    "inf": ("qwen2-tied", _set("model.layers.1.self_attn.v_proj.bias", float("-inf")), "v_proj.bias holds infinity"),
    "truncated": ("llama2", _truncate, "model.safetensors is truncated"),
    "trailing": ("llama2", _grow, "not fully covered"),
    "header": ("llama2", lambda f: os.truncate(f / "model.safetensors", 60), "truncated.*header"),
    "empty": ("llama2", lambda f: os.truncate(f / "model.safetensors", 3), "truncated.*header"),
    "pickled": ("llama2", _pickle_instead, "pickled weights.*convert them to safetensors first"),
    "no weights": ("llama2", lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing.*fetch"),
    "no config": ("llama2", lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": ("llama2", lambda f: os.truncate(f / "config.json", 20), "not valid JSON"),
    "lost shard": ("llama2", _index({_NORM: "model-2.safetensors"}), "lacks model-2.safetensors"),
    "index lies": ("llama2", _index({"other": "model.safetensors"}), "disagree on other"),
    "untied without output": ("llama3", lambda f: _edit(f, lambda t: t.pop("lm_head.weight")), "lm_head.weight is missing"),
    "tied with another output": ("llama3", _config(tie_word_embeddings=True), "lm_head.weight differs from"),
    "mixed dtypes": (
        "llama2",
        lambda f: _edit(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": t["model.layers.0.self_attn.q_proj.weight"].half()})),
        "mix torch.float16, torch.float32.*--dtype",
    ),
    "double": ("llama2", lambda f: _edit(f, lambda t: t.update({_NORM: t[_NORM].double()})), "dtype F64"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_import_refuses(case, copy_of, tmp_path):
    name, spoil, message = REFUSED[case]
    source = copy_of(name)
    spoil(source)
    (tmp_path / "to").mkdir()
    result = CliRunner().invoke(main, ["convert", "import", str(source), str(tmp_path / "to" / "out")])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    assert re.search(message, result.output), result.output
    assert list((tmp_path / "to").iterdir()) == []


def test_overwriting_needs_force_and_force_spares_other_folders(hf_models, tmp_path):
    source, out = hf_models["llama2"], tmp_path / "out"
    import_hf(source, out)
    before = (out / "weights" / ".metadata").stat().st_mtime_ns
    with pytest.raises(ValueError, match="--force"):
        import_hf(source, out)
    assert (out / "weights" / ".metadata").stat().st_mtime_ns == before
    import_hf(hf_models["qwen3"], out, force=True)
    assert load_architecture(out).family == "qwen3"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no complete mark of kvcat"):
        import_hf(source, precious, force=True)
    assert (precious / "thesis.tex").exists()
    with pytest.raises(ValueError, match="--force"):
        export_hf(out, precious)


def _imported_copy(imported, name, tmp_path):
    return shutil.copytree(imported[name], tmp_path / "checkpoint")


def _refuses_export(checkpoint, tmp_path, message, **options):
    with pytest.raises(ValueError, match=message):
        export_hf(checkpoint, tmp_path / "to" / "out", **options)
    assert not (tmp_path / "to").exists() or list((tmp_path / "to").iterdir()) == []


def test_export_refuses_another_architecture(imported, hf_models, tmp_path):
    refuse = lambda name, base, message: _refuses_export(  # noqa: E731
        imported[name], tmp_path, message, base=hf_models[base]
    )
    refuse("llama2", "qwen2-tied", "lacks .*output_layer|has shape|output_layer|lacks .*linear_qkv.bias")
    refuse("qwen2-tied", "qwen2-untied", "lacks .*output_layer.weight.*tie_word_embeddings|has shape")
    refuse("qwen3", "qwen2-tied", "vocab_size = 128 .* saved with a vocabulary of 131")


def test_export_refuses_extra_and_tied_output(imported, copy_of, tmp_path):
    base = copy_of("llama3")
    edit_config(base, tie_word_embeddings=True)
    _refuses_export(imported["llama3"], tmp_path, "output_layer.weight.*tie_word_embeddings", base=base)
    edit_config(base, tie_word_embeddings=False, vocab_size=129)
    _refuses_export(imported["llama3"], tmp_path, r"word_embeddings.weight has shape \[128, 64\]", base=base)
    edit_config(base, vocab_size=128, num_hidden_layers=3)
    _refuses_export(imported["llama3"], tmp_path, "has shape", base=base)
    edit_config(base, num_hidden_layers=2, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    _refuses_export(imported["llama3"], tmp_path, r"lacks .*linear_qkv.bias", base=base)


def test_export_refuses_truncated_and_damaged_checkpoints(imported, hf_models, tmp_path):
    checkpoint = _imported_copy(imported, "llama2", tmp_path)
    data = checkpoint / "weights" / "__0_0.distcp"
    whole = data.read_bytes()
    os.truncate(data, len(whole) - 1)
    _refuses_export(checkpoint, tmp_path, "truncated")
    # What one without a manifest is looked through for.
    (checkpoint / MANIFEST).unlink()
    accept = {"unverified": True}
    _refuses_export(checkpoint, tmp_path, "missing or truncated", **accept)
    # The last bytes of the first norm's payload become NaN.
    norm = tensors_of(hf_models["llama2"])["model.norm.weight"].numpy().tobytes()
    assert whole.count(norm) == 1
    data.write_bytes(whole.replace(norm, norm[:-4] + b"\x00\x00\xc0\x7f"))
    _refuses_export(checkpoint, tmp_path, "model.norm.weight holds NaN", **accept)
    (checkpoint / "weights" / "metadata.json").unlink()
    _refuses_export(checkpoint, tmp_path, "no Megatron distributed checkpoint", **accept)


def test_model_prefix_is_found_and_several_models_are_refused(imported):
    reader = CheckpointReader(imported["qwen3"] / "weights")
    assert {"embedding.word_embeddings.weight", "module.embedding.word_embeddings.weight"} <= set(
        reader.shapes
    )
    assert model_prefix(reader) == ""
    reader.shapes = {k: v for k, v in reader.shapes.items() if k.startswith("module.")}
    reader.shapes["optimizer.state.exp_avg.module.embedding.word_embeddings.weight"] = (1, 1)
    assert model_prefix(reader) == "module."
    reader.location = lambda key: key
    reader.shapes["teacher.embedding.word_embeddings.weight"] = (1, 1)
    with pytest.raises(ValueError, match="several models"):
        model_prefix(reader)


def test_layouts_that_do_not_divide_are_refused(hf_models):
    arch = load_architecture(hf_models["llama3"])
    check_layout(arch, 2, 2)
    with pytest.raises(ValueError, match="tensor_model_parallel_size 4 .* num_query_groups 2; .* work: 1, 2"):
        check_layout(arch, 4, 1)
    with pytest.raises(ValueError, match="pipeline_model_parallel_size 3 .*num_layers 2; .* work: 1, 2"):
        check_layout(arch, 1, 3)
