"""What stands before documents in a dataset: chosen, recorded, and compared when the dataset is there already."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.data.indexed import build_dataset, read_manifest
from tests.tokens.small_tokenizers import BY_NAME, expected, save_tokenizer

from .conftest import TEXTS, write_jsonl

MENTION = "the cache <|im_end|> of text </s> grows"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = save_tokenizer(BY_NAME[name], tmp_path_factory.mktemp("tokenizers") / name)
        return made[name]

    return get


@pytest.fixture
def corpus(tmp_path):
    records = [{"id": f"d{i}", "text": text} for i, text in enumerate([MENTION, *TEXTS[:4]])]
    return write_jsonl(tmp_path / "corpus.jsonl", records)


def documents(out):
    ids = np.fromfile(out / "train.bin", dtype=np.uint16).tolist()
    found, start = [], 0
    for line in (out / "train.documents.jsonl").read_text().splitlines():
        end = start + json.loads(line)["tokens"]
        found.append(ids[start:end])
        start = end
    assert start == len(ids)
    return found


@pytest.mark.parametrize(
    ("name", "bos", "first"),
    [
        ("plain", None, []),
        ("plain", "always", [0]),
        ("bos-and-eos", None, [0]),
        ("bos-and-eos", "auto", [0]),
        ("bos-and-eos", "never", []),
        ("llama", None, [0]),
    ],
)
def test_documents_begin_as_asked_and_the_manifest_says_how(name, bos, first, folder, corpus, tmp_path):
    out, chosen = tmp_path / "data", ["--bos", bos] if bos else []
    words = ["data", "build", corpus, "--tokenizer", folder(name), "--out", out, "--held-out", 0, *chosen]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    texts = [MENTION, *TEXTS[:4]]
    wanted = [[*first, *expected(BY_NAME[name], folder(name), text, "alone"), 1] for text in texts]
    assert documents(out) == wanted
    told = read_manifest(out).tokenizer
    assert (told["bos"], told["beginning"], told["special_tokens"]) == (bos or "auto", first, "text")


def test_special_tokens_become_control_tokens_when_asked(folder, corpus, tmp_path):
    out = tmp_path / "data"
    options = {"held_out": 0, "progress": False, "special_tokens": "control", "say": lambda line: None}
    build_dataset([corpus], folder("plain"), out, **options)
    assert 3 in documents(out)[0] and documents(out)[0].count(1) == 2
    assert read_manifest(out).tokenizer["special_tokens"] == "control"


def as_older_versions_wrote_it(out):
    path = out / "manifest.json"
    told = json.loads(path.read_text())
    for name in ("bos", "beginning", "special_tokens"):
        del told["tokenizer"][name]
    path.write_text(json.dumps(told))


@pytest.mark.parametrize(("name", "reused"), [("plain", True), ("bos-and-eos", False)])
def test_datasets_of_older_versions_stay_valid(name, reused, folder, corpus, tmp_path):
    """They have nothing before their documents; only where that would change now is it asked about."""
    out, options = tmp_path / "data", {"held_out": 0, "progress": False, "say": lambda line: None}
    build_dataset([corpus], folder(name), out, bos="never", **options)
    as_older_versions_wrote_it(out)
    before = (out / "train.bin").read_bytes()
    assert read_manifest(out).splits["train"].documents == 5
    assert build_dataset([corpus], folder(name), out, bos="never", **options).reused
    if reused:
        assert build_dataset([corpus], folder(name), out, **options).reused
    else:
        with pytest.raises(ValueError, match=r"ids before each document: none there, \[0\] now; --bos never"):
            build_dataset([corpus], folder(name), out, **options)
    assert (out / "train.bin").read_bytes() == before


def test_bos_of_a_tokenizer_without_one_is_refused_before_anything_is_written(
    tokenizer_dir, corpus, tmp_path
):
    out = tmp_path / "data"
    with pytest.raises(ValueError, match="bos='always': the tokenizer has no BOS token"):
        build_dataset([corpus], tokenizer_dir, out, bos="always", progress=False)
    assert not out.exists()
