"""What belongs to a tokenizer survives a conversion: every kind of file, named chat templates among them."""

from __future__ import annotations

import pytest

from kvcat_nemo.conversion.folders import copy_sidecars
from kvcat_nemo.tokens import chat_form, load, tokenizer_files
from tests.tokens.small_tokenizers import BY_NAME, NAMED, save_tokenizer

KEPT = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "qwen.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
]
LEFT = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "optimizer.pt",
    "modeling_own.py",
    "README.md",
    "additional_chat_templates/notes.txt",
]


def test_every_file_of_a_tokenizer_is_copied_and_nothing_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "a" / "target"
    for name in KEPT + LEFT:
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    copy_sidecars(source, target)
    there = {
        path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()
    }
    assert there == {name: name for name in KEPT}
    assert [path.as_posix() for path in tokenizer_files(source)] == sorted(KEPT[2:])


@pytest.mark.parametrize("kind", ["as saved", "one list", "links"])
def test_named_chat_templates_survive(kind, tmp_path):
    import json

    source = save_tokenizer(BY_NAME["named-templates"], tmp_path / "source")
    if kind == "one list":  # as older versions of transformers wrote them
        (source / "chat_template.jinja").unlink()
        (source / "additional_chat_templates" / "rag.jinja").unlink()
        config = json.loads((source / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": text} for name, text in NAMED.items()]
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    if kind == "links":  # as the hub's cache keeps them
        for path in [path for path in source.rglob("*") if path.is_file()]:
            blob = tmp_path / "blobs" / path.name
            blob.parent.mkdir(exist_ok=True)
            path.rename(blob)
            path.symlink_to(blob)
    copy_sidecars(source, tmp_path / "imported")
    copy_sidecars(tmp_path / "imported", tmp_path / "exported")
    before, after = load(source), load(tmp_path / "exported")
    assert after.chat_template == before.chat_template == NAMED
    for name in NAMED:
        assert chat_form(after, name) == chat_form(before, name)
    assert not any(path.is_symlink() for path in (tmp_path / "exported").rglob("*"))
