"""The same folder, every reader: the same function, or refused by all of them with the field's name."""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from kvcat_nemo.models.frequencies import float32_error, inverse_frequencies
from kvcat_nemo.models.hf_config import read_model
from kvcat_nemo.models.load import load_causal_lm
from kvcat_nemo.models.weights import INDEX, SINGLE, check_tied, find_weights
from tests.models import tiny_models
from tests.models.tiny_models import NULL, ROPES, THETA, TOKENS, edit, make, written


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


# --- the readers ---


def _room(folder):
    check_tied(folder, find_weights(folder), read_model(folder).tied)


def _evaluation(folder):
    from kvcat_nemo.evaluate.models import find_model

    find_model(folder)


def _conversion(folder):
    """What import and verify check before they start."""
    from kvcat_nemo.conversion.arch import load_architecture
    from kvcat_nemo.conversion.importing import check_source
    from kvcat_nemo.conversion.safetensors_io import SafetensorsFolder

    check_source(SafetensorsFolder(folder), load_architecture(folder))


def _command(*arguments):
    from kvcat_nemo.cli import main

    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exit_code:
        if not isinstance(result.exception, SystemExit):
            raise result.exception  # a command must say what is wrong, not fall over it
        raise ValueError(result.output)


def _generate(folder):
    _command("model", "generate", folder, "--tokens", 1)


def _compress(folder):
    text = folder.parent / "text.txt"
    text.write_text("a text of some words, not too short for a compressor")
    _command(
        *("compress", folder, "--text", text, "--compressor", "recent", "--keep", 0.5),
        *("--out", folder.parent / "out.safetensors"),
    )


READERS = {
    "the room": _room,
    "loading": load_causal_lm,
    "evaluation": _evaluation,
    "conversion": _conversion,
    "kvcat model generate": _generate,
    "kvcat compress": _compress,
}


# --- what is the same function ---


def _files(folder, **renamed):
    for old, new in renamed.items():
        (folder / f"{old}.safetensors").rename(folder / new)


def _extra_buffers(folder):
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def _store_output(folder, change=0.0):
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + change
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def _index(folder, **changed):
    names = {name: SINGLE for name in load_file(folder / SINGLE)} | changed
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _config(**changes):
    return lambda folder: edit(folder, **changes)


def _nothing(folder):
    pass


SAME = {
    f"{family}, {rope}, as transformers {form} writes it": (
        {"family": family, "rope": rope},
        _config(**written(ROPES[rope], form)),
    )
    for family, rope in [("Llama", r) for r in ROPES]
    + [("Qwen2", "linear"), ("Qwen3", "llama3"), ("Mistral", "plain")]
    for form in ("4", "5", "both")
} | {
    "rope_scaling without rope_theta in rope_parameters' place": ({}, _config(rope_theta=THETA)),
    "type beside the same rope_type": (
        {"rope": "linear"},
        _config(**written(ROPES["linear"] | {"type": "linear"}, "4")),
    ),
    "type alone": ({"rope": "linear"}, _config(**written({"rope_type": "linear", "factor": 4}, "4"))),
    "dtype beside the same torch_dtype": ({}, _config(dtype="float32", torch_dtype="torch.float32")),
    "other dtype than the weights'": ({}, _config(dtype="bfloat16", torch_dtype=None)),
    "head_dim missing": ({}, _config(head_dim=None)),
    "head_dim null in Qwen2": ({"family": "Qwen2"}, _config(head_dim=NULL)),
    "tie_word_embeddings missing": ({}, _config(tie_word_embeddings=None)),
    "tie_word_embeddings null": ({}, _config(tie_word_embeddings=NULL)),
    "hidden_act by its other name": ({}, _config(hidden_act="swish")),
    "hidden_act missing": ({}, _config(hidden_act=None)),
    "hidden_activation agrees": ({}, _config(hidden_activation="silu")),
    "attention_bias in Qwen2, which does not read it": ({"family": "Qwen2"}, _config(attention_bias=NULL)),
    "partial_rotary_factor 1": ({}, _config(partial_rotary_factor=1.0)),
    "layer_types all full": ({"family": "Qwen2"}, _config(layer_types=["full_attention"] * 2)),
    "a window that is switched off": (
        {"family": "Qwen2"},
        _config(sliding_window=8, use_sliding_window=False),
    ),
    "shards": ({"shard": 40_000}, _nothing),
    "an index of the one file": ({}, _index),
    "a consolidated copy that nobody reads": (
        {},
        lambda f: save_file({"tok": torch.ones(1)}, f / "consolidated.safetensors"),
    ),
    "a cache beside the model": ({}, lambda f: save_file({"k": torch.ones(1)}, f / "paper.safetensors")),
    "buffers of old checkpoints": ({}, _extra_buffers),
    "tied, the output layer stored as well": ({"tied": True}, _store_output),
}


@pytest.mark.parametrize("name", SAME)
def test_every_reader_sees_the_same_function(root, tmp_path, name):
    options, change = SAME[name]
    folder, logits = make(root, tmp_path / "model", **options)
    change(folder)
    if name == "type alone":
        edit(folder, rope_scaling={"type": "linear", "factor": 4})
    model = load_causal_lm(folder)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits)
    described = read_model(folder)
    expected = inverse_frequencies(
        described.kv_channels, described.rope.theta, described.rope.scaling, torch.float64
    )
    error = (model.model.rotary_emb.inv_freq.double() / expected - 1).abs().max()
    assert error <= float32_error(described.rope.theta, described.rope.scaling)
    for reader, read in READERS.items():
        if reader == "conversion" and (options.get("rope") == "yarn" or options.get("family") == "Mistral"):
            with pytest.raises(ValueError, match="rope_type is 'yarn'|unknown architecture"):
                read(folder)
            continue
        if reader == "kvcat compress" and options.get("tied"):
            continue  # the same loader; one command on every kind of folder is enough
        read(folder)


# --- what is refused ---


def _pair(folder, **changed):
    """model.safetensors beside shards of another model."""
    single = load_file(folder / SINGLE)
    save_file(single, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    names = {name: "model-00001-of-00001.safetensors" for name in single}
    (folder / INDEX).write_text(json.dumps({"weight_map": names | changed}))


def _outside(folder, name):
    (folder.parent / "outside.safetensors").write_bytes((folder / SINGLE).read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: name for n in load_file(folder / SINGLE)}}))


def _stray(name):
    return lambda folder: save_file({"x": torch.ones(1)}, folder / name)


_LINEAR = {"rope_type": "linear", "factor": 4.0}
REFUSED = {
    "theta differs": (_config(rope_theta=10000.0, rope_parameters={"rope_type": "default", "rope_theta": 5e5}), r"rope_theta = 10000.0: .*rope_parameters.rope_theta = 500000.0"),
    "scaling beside other parameters": (_config(rope_scaling=_LINEAR, rope_parameters=_LINEAR | {"factor": 2.0}), r"rope_scaling = .*rope_parameters = "),
    "scaling beside plain parameters": (_config(rope_scaling=_LINEAR, rope_parameters={"rope_type": "default"}), r"rope_scaling = .*rope_parameters = "),
    "type beside another rope_type": (_config(rope_scaling={"type": "yarn", "rope_type": "default", "factor": 4.0, "original_max_position_embeddings": 32}), r"rope_scaling.rope_type = 'default': .*rope_scaling.type = 'yarn'"),
    "a factor without a type": (_config(rope_scaling={"factor": 4.0}), r"rope_scaling.factor = 4.0: its rope_type is missing"),
    "a factor beside default": (_config(rope_parameters={"rope_type": "default", "factor": 4.0}), r"rope_parameters.factor = 4.0"),
    "a rope per kind of layer": (_config(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5e5}}), r"rope_parameters.full_attention = "),
    "dynamic": (_config(rope_scaling={"type": "dynamic", "factor": 4.0}), r"rope_type is 'dynamic': its frequencies change"),
    "longrope": (_config(rope_scaling={"rope_type": "longrope", "factor": 4.0}), r"rope_type is 'longrope'"),
    "an unknown rope": (_config(rope_scaling={"rope_type": "spiral", "factor": 4.0}), r"rope_type is 'spiral'"),
    "original context differs": (_config(rope_scaling=ROPES["llama3"], rope_parameters=None, original_max_position_embeddings=64), r"original_max_position_embeddings = 32: .*= 64"),
    "a rope that is text": (_config(rope_scaling="linear"), r"rope_scaling = 'linear': it must be an object"),
    "theta is text": (_config(rope_theta="500000", rope_parameters=None), r"rope_theta = '500000': it must be a finite number"),
    "theta is zero": (_config(rope_theta=0, rope_parameters=None), r"rope_theta = 0: it must be a finite number"),
    "factor is negative": (_config(rope_scaling=_LINEAR | {"factor": -4}, rope_parameters=None), r"factor = -4"),
    "factor is true": (_config(rope_scaling=_LINEAR | {"factor": True}, rope_parameters=None), r"factor = True"),
    "llama3 without its lengths": (_config(rope_scaling={"rope_type": "llama3", "factor": 4.0}, rope_parameters=None), r"lacks low_freq_factor, high_freq_factor"),
    "half of a head": (_config(partial_rotary_factor=0.5), r"partial_rotary_factor = 0.5"),
    "dtype differs": (_config(dtype="float32", torch_dtype="bfloat16"), r"dtype = 'float32': .*torch_dtype = 'bfloat16'"),
    "another class": (_config(architectures=["MistralForCausalLM"]), r"unknown architecture|architectures=\['MistralForCausalLM'\]"),
    "weights of another file": (_config(transformers_weights="other.safetensors"), r"transformers_weights = 'other.safetensors'"),
    "no KV heads said": (_config(model_type="qwen2", architectures=["Qwen2ForCausalLM"], num_key_value_heads=None), r"num_key_value_heads is missing"),
    "a tie that is text": (_config(tie_word_embeddings="false"), r"tie_word_embeddings = 'false': it must be true or false"),
    "eps is text": (_config(rms_norm_eps="1e-5"), r"rms_norm_eps = '1e-5'"),
    "layers without end": (_config(num_hidden_layers=10**30), r"num_hidden_layers=1000.*at most 10,000"),
    "heads with a point": (_config(num_attention_heads=4.0), r"num_attention_heads=4.0: not an integer"),
    "an odd head": (_config(head_dim=15), r"head_dim = 15"),
    "hidden_activation differs": (_config(hidden_activation="gelu"), r"hidden_act = 'silu': .*hidden_activation = 'gelu'"),
    "a window in Llama": (_config(sliding_window=8), r"sliding_window"),
    "layer_types of other layers": (_config(layer_types=["full_attention"]), r"layer_types names 1 layers"),
    "layer_types of an unknown kind": (_config(layer_types=["chunked_attention"] * 2), r"layer_types"),
    "the file beside the index": (_pair, r"model.safetensors stands beside model.safetensors.index.json"),
    "an index out of the folder": (lambda f: _outside(f, "../outside.safetensors"), r"= '../outside.safetensors': a shard must be"),
    "an index of an absolute path": (lambda f: _outside(f, str(f.parent / "outside.safetensors")), r"a shard must be a safetensors file in the model's own folder"),
    "an index of a pickle": (lambda f: _outside(f, "pytorch_model.bin"), r"= 'pytorch_model.bin'"),
    "an index without its map": (lambda f: (f / INDEX).write_text("{}"), r"weight_map must name"),
    "an index of one tensor too many": (lambda f: _index(f, **{"model.other": SINGLE}), r"disagree on model.other"),
    "a shard that no index names": (_stray("model-00003-of-00003.safetensors"), r"model-00003-of-00003.safetensors looks like a part of the model, but no"),
    "an adapter": (_stray("adapter_model.safetensors"), r"adapter_model.safetensors is an adapter"),
    "tied, but another output layer": (lambda f: (edit(f, tie_word_embeddings=True), _store_output(f, 0.5)), r"tie_word_embeddings is true, but lm_head.weight differs"),
    "untied without an output layer": (lambda f: save_file({n: t for n, t in load_file(f / SINGLE).items() if n != "lm_head.weight"}, f / SINGLE, metadata={"format": "pt"}), r"lm_head.weight is missing although tie_word_embeddings is false"),
    "a field twice": (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("{", '{"rms_norm_eps": 0.1, ', 1)), r"names 'rms_norm_eps' twice"),
    "a truncated file": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-8]), r"truncated"),
    "no JSON object": (lambda f: (f / "config.json").write_text("[]"), r"holds no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_every_reader_refuses(root, tmp_path, name):
    change, message = REFUSED[name]
    folder, _ = make(root, tmp_path / "model")
    edit(folder, **written(ROPES["plain"], "5"))
    change(folder)
    for reader, read in READERS.items():
        with pytest.raises(ValueError) as error:
            read(folder)
        text = " ".join(str(error.value).split())
        own = (
            r"layer_types|sliding_window is 8|unknown architecture|model_type"
            if reader == "conversion"
            else "$^"
        )
        assert re.search(message, text) or re.search(own, text), f"{reader}: {text}"


def test_an_index_that_lacks_a_shard_of_the_folder(root, tmp_path):
    folder, _ = make(root, tmp_path / "model", shard=40_000)
    index = json.loads((folder / INDEX).read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != last}
    (folder / INDEX).write_text(json.dumps(index))
    for read in READERS.values():
        with pytest.raises(
            ValueError, match="looks like a part of the model, but model.safetensors.index.json"
        ):
            read(folder)


def test_the_fingerprint_covers_exactly_what_is_loaded(root, tmp_path):
    from kvcat_nemo.evaluate.models import find_model, weights_fingerprint

    folder, logits = make(root, tmp_path / "model", shard=40_000)
    found = find_model(folder)
    assert set(found.weights) == set(folder.glob("model-*.safetensors")) and len(found.weights) > 2
    before = weights_fingerprint(found)
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    assert weights_fingerprint(find_model(folder)) == before
    for file in found.weights:
        kept = file.read_bytes()
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors[name] = tensors[name] + 1
        save_file(tensors, file, metadata={"format": "pt"})
        assert weights_fingerprint(find_model(folder)) != before
        with torch.no_grad():
            assert not torch.equal(load_causal_lm(folder)(TOKENS).logits, logits)
        file.write_bytes(kept)
    assert weights_fingerprint(find_model(folder)) == before


def test_what_the_library_alone_would_read(root, tmp_path):
    """The fault that all of this is for: 4.57 takes theta 10,000 of a folder that transformers 5 wrote, without a word."""
    from transformers import AutoModelForCausalLM

    from kvcat_nemo.models.load import check_loaded

    folder, logits = make(root, tmp_path / "model")
    edit(folder, **written(ROPES["plain"], "5"))
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        same = torch.equal(alone(TOKENS).logits, logits)
    assert same == tiny_models.NEW
    if tiny_models.NEW:
        check_loaded(alone, read_model(folder), "model")
    else:
        with pytest.raises(ValueError, match=r"the rope's frequencies are off .*rope_theta 500000"):
            check_loaded(alone, read_model(folder), "model")
