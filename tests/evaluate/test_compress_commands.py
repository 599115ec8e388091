"""kvcat compress and kvcat generate: a document compressed once and asked several times."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.compress import KVCache

TEXT = "the cache of a long text grows with every token of it. " * 8


def kvcat(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "paper.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("compressor", ["recent:sinks=2", "attention-matching", "attention-matching+int8"])
def test_a_document_is_asked_several_questions(model_dir, document, tmp_path, compressor):
    out = tmp_path / "cache.safetensors"
    done = kvcat(
        "compress", model_dir, "--text", document, "--compressor", compressor, "--keep", 0.25, "--out", out
    )
    assert done.exit_code == 0, done.output
    tokens = int(re.search(r"([\d,]+) tokens", done.output).group(1).replace(",", ""))
    share = float(re.search(r"\(([\d.]+) %\)", done.output).group(1))
    assert share < 30 and out.stat().st_size > 1000
    cache = KVCache.load(out)
    assert cache.slots == int(0.25 * tokens) and cache.lengths_B.tolist() == [tokens]
    before = out.read_bytes()
    asked = kvcat(
        "generate", model_dir, "--cache", out, "--prompt", "the", "--prompt", "of it", "--tokens", 5
    )
    assert asked.exit_code == 0, asked.output
    assert f"slots per layer and head for {tokens} tokens of text" in asked.output and " MiB" in asked.output
    answers = asked.output.split("---\n")
    assert len(answers) == 3 and "of it" in answers[1]
    alone = kvcat("generate", model_dir, "--cache", out, "--prompt", "of it", "--tokens", 5)
    assert answers[1] in alone.output  # the first question left nothing behind
    assert out.read_bytes() == before


def test_another_models_cache_is_refused(model_dir, other_model_dir, document, tmp_path):
    out = tmp_path / "cache.safetensors"
    assert not kvcat(
        "compress", model_dir, "--text", document, "--compressor", "random", "--keep", 0.5, "--out", out
    ).exit_code
    asked = kvcat("generate", other_model_dir, "--cache", out, "--prompt", "the")
    assert asked.exit_code == 1 and "another model's cache means nothing to it" in asked.output


def test_bad_input_is_named_before_anything_is_written(model_dir, document, tmp_path):
    out = tmp_path / "cache.safetensors"
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    cases = [
        (("--text", empty, "--keep", 0.5), "the document is empty"),
        (("--text", document), "give either --keep FRACTION or --keep-tokens N"),
        (("--text", document, "--keep", 0.5, "--keep-tokens", 3), "give either"),
        (("--text", document, "--keep", 1.5), "keep_fraction=1.5"),
        (("--text", document, "--keep", 0.00001), "keeps nothing"),
        (("--text", document, "--keep", 0.5, "--compressor", "h3o"), "choose among"),
    ]
    for words, message in cases:
        done = kvcat("compress", model_dir, *words, "--out", out)
        assert done.exit_code == 1 and message in done.output, done.output
        assert not list(tmp_path.glob("*.safetensors*"))
    done = kvcat("compress", model_dir, "--text", document, "--keep", 0.5, "--out", tmp_path / "no" / "x")
    assert done.exit_code == 1 and "its folder does not exist" in done.output
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    asked = kvcat("generate", model_dir, "--cache", tmp_path / "x.safetensors", "--prompt", "a")
    assert asked.exit_code == 1 and "x.safetensors" in asked.output


def test_compressors_are_listed_with_their_settings():
    done = kvcat("compress", "--list")
    assert done.exit_code == 0 and "attention-matching\n" in done.output and "sinks=0" in done.output
