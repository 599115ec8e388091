"""What a model does not read is refused by the whole run's check, before weights are loaded or results are written."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.compress import KVCache
from kvcat_nemo.evaluate.models import find_model
from kvcat_nemo.evaluate.registry import protocol_class
from tests.support.hf_models import save_model

LIMIT = 60
WINDOW = {"source": "s", "doc": "d", "start": 0, "ids": [5] * 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "short", max_position_embeddings=LIMIT)


@pytest.fixture
def windows(tmp_path):
    path = tmp_path / "windows.json"
    path.write_text(json.dumps([WINDOW]))
    return str(path)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "continuation",
            {"compressors": ["gradient:tokens=21"]},
            "fewer tokens of compressor gradient:tokens=21",
        ),
        ("continuation", {"compressors": ["gradient:tokens=21+int8"]}, "fewer tokens of compressor gradient"),
        ("gradient", {"lessons": "repeat", "lesson_tokens": 21}, "fewer tokens of lesson_tokens"),
        ("gradient", {"lessons": "sample", "lesson_tokens": 30}, "fewer tokens of lesson_tokens"),
    ],
)
def test_what_is_fed_besides_the_continuation_counts(name, settings, message, folder, windows, tmp_path):
    out = tmp_path / "out"
    given = {
        "models": [str(folder)],
        "out": str(out),
        "windows": windows,
        "prefix": 40,
        "continuation": 10,
        "keep": ["0.25"],
    }
    fits = (
        {"compressors": ["gradient:tokens=20"]}
        if name == "continuation"
        else {**settings, "lesson_tokens": 20}
    )
    protocol_class(name).of({**given, **fits}).check()
    with pytest.raises(ValueError, match=rf"model short: text of \d\d tokens .* reads {LIMIT} .*{message}"):
        protocol_class(name).of({**given, **settings}).run()
    assert not out.exists()


@pytest.mark.parametrize("value", [None, "60", 0, -1, 1.5])
def test_a_model_must_say_how_much_it_reads(value, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    other = save_model(tmp_path / "other", max_position_embeddings=LIMIT)
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": value}))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        find_model(other)


def kvcat(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_commands_refuse_before_weights_are_loaded(folder, tmp_path, monkeypatch):
    text, out = tmp_path / "t.txt", tmp_path / "c.safetensors"
    words = ("compress", folder, "--text", text, "--out", out, "--keep", 0.5, "--compressor")
    text.write_text("a" * 40)
    assert kvcat(*words, "random").exit_code == 0
    cache = KVCache.load(out)
    asked = ("generate", folder, "--cache", out, "--prompt", "b" * 10)
    assert kvcat(*asked, "--tokens", 10).exit_code == 0

    import kvcat_nemo.evaluate.models as models

    monkeypatch.setattr(models, "load_model", lambda *a, **o: pytest.fail("weights were loaded"))
    for done in (
        kvcat(*asked, "--tokens", 11),
        kvcat(*asked),  # 60 new tokens, as by default
        kvcat(*asked, "--prompt", "c" * 11, "--tokens", 10),
    ):
        assert done.exit_code == 1 and f"the model reads {LIMIT}" in done.output, done.output
        assert "give fewer --tokens" in done.output
    done = kvcat(*words, "gradient:tokens=21")
    assert done.exit_code == 1 and "61 tokens (40 and 21 more)" in done.output
    text.write_text("a" * 61)
    done = kvcat(*words, "random")
    assert done.exit_code == 1 and "text of" not in done.output and "give a shorter text" in done.output
    done = kvcat("model", "generate", folder, "--prompt", "a" * 50, "--tokens", 11)
    assert done.exit_code == 1 and f"reads {LIMIT}" in done.output
    assert KVCache.load(out).facts == cache.facts
    for value in ("0", "-3", "1.5"):
        assert kvcat(*asked, "--tokens", value).exit_code == 2
        assert kvcat("model", "generate", folder, "--tokens", value).exit_code == 2


def test_a_cache_of_several_rows_or_without_a_model_is_asked_about(folder, tmp_path):
    from kvcat_nemo.compress import prefill
    from kvcat_nemo.evaluate.models import load_model

    model, _, facts = load_model(folder, device="cpu")
    cache = prefill(model, [[5] * 20, [6] * 10]).cache
    assert cache.facts["model"] == facts.fingerprint  # of what load_model loaded, in Python too
    cache.save(tmp_path / "two.safetensors")
    done = kvcat("generate", folder, "--cache", tmp_path / "two.safetensors", "--prompt", "b", "--tokens", 3)
    assert done.exit_code == 1 and "generate from one row" in done.output
