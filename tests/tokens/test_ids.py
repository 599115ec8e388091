"""The same text has the same ids in every command; what stands before it is the tokenizer's or the user's choice."""

from __future__ import annotations

import json
import random

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.tokens import (
    IdRules,
    answer_ids,
    beginning,
    document_ids,
    following_ids,
    load,
    text_of,
)
from tests.tokens.small_tokenizers import BY_NAME, CASES, SPECIAL, expected

TEXT = (
    "the cache <|im_end|> of text\r\nand </s> so on, the cache of text number 3 grows with every token of it."
)
NAMES = [case.name for case in CASES]


def kvcat(*words):
    return CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())  # a byte order mark, as some editors leave it
    return path


def by_compress(folder, text_file, monkeypatch):
    import kvcat_nemo.compress as module

    seen, compress = [], module.compress
    monkeypatch.setattr(module, "compress", lambda m, rows, *a: seen.extend(rows) or compress(m, rows, *a))
    out = text_file.parent / "cache.safetensors"
    words = ("--compressor", "random", "--keep", 0.5, "--out", out)
    done = kvcat("compress", folder, "--text", text_file, *words)
    assert done.exit_code == 0, done.output
    return seen[0]


def by_data_build(folder, text_file, monkeypatch):
    from kvcat_nemo.data.reading import ReadOptions, read_documents
    from kvcat_nemo.data.tokenizer import load_tokenizer

    # What build_dataset writes; tests/data/test_bos.py looks at its files.
    (document,) = read_documents([text_file], ReadOptions())
    tokenizer = load_tokenizer(folder)
    *ids, last = tokenizer.encode([document.text])[0]
    assert last == tokenizer.eod_id == 1
    return ids


def by_windows(folder, text_file, monkeypatch):
    from kvcat_nemo.data.tokenizer import load_tokenizer
    from kvcat_nemo.evaluate.windows import corpora_from_files, cut_windows

    tokenizer = load_tokenizer(folder)
    length = len(document_ids(tokenizer.hf, TEXT))
    (window,) = cut_windows(
        corpora_from_files([text_file]), tokenizer, 1, length=length, min_chars_per_token=0
    )
    return window.ids


def by_long_qa(folder, text_file, monkeypatch):
    from kvcat_nemo.data.questions import QADocument, Question
    from kvcat_nemo.evaluate.long_qa import LongQA

    question = Question("q", "Is it?", ("yes", "no"), 0, (), {})
    monkeypatch.setattr(LongQA, "_documents", lambda self: [QADocument("d", TEXT, (question,))])
    (context,) = LongQA(models=[str(folder)], out="unused").contexts(load(folder), 512)
    return context.ids


def by_base_ability(folder, text_file, monkeypatch):
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is in the first environment")
    from kvcat_nemo.evaluate.harness import harness_model

    assert issubclass(harness_model(), harness.HFLM)
    model = object.__new__(harness_model())
    model.tokenizer = load(folder)
    return model.tok_encode(TEXT)


def by_model_generate(folder, text_file, monkeypatch):
    from transformers import LlamaForCausalLM

    seen, generate = [], LlamaForCausalLM.generate
    monkeypatch.setattr(
        LlamaForCausalLM,
        "generate",
        lambda m, ids, **o: seen.append(ids[0].tolist()) or generate(m, ids, **o),
    )
    done = kvcat("model", "generate", folder, "--prompt", TEXT, "--tokens", 2)
    assert done.exit_code == 0, done.output
    return seen[0]


ENTRIES = [
    by_compress,
    by_data_build,
    by_windows,
    by_long_qa,
    by_base_ability,
    by_model_generate,
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
def test_every_command_makes_the_same_ids_of_a_text(entry, name, folders, text_file, monkeypatch):
    folder = folders(name)
    wanted = expected(BY_NAME[name], folder, TEXT)
    assert entry(folder, text_file, monkeypatch) == wanted
    assert not set(wanted[len(BY_NAME[name].first) :]) & set(range(len(SPECIAL)))


@pytest.mark.parametrize("name", NAMES)
def test_made_up_contexts_begin_as_documents_do(name, folders):
    from kvcat_nemo.evaluate.needle import Needle
    from kvcat_nemo.evaluate.ruler import Ruler

    tokenizer, case = load(folders(name)), BY_NAME[name]
    first = tokenizer.convert_tokens_to_ids(list(case.first))
    needle = Needle(models=["m"], out="unused", lengths=["600"], samples=1).contexts(tokenizer, 512)
    ruler = Ruler(models=["m"], out="unused", lengths=["600"], samples=1).contexts(tokenizer, 512)
    for context in needle + ruler:
        assert context.ids[: len(first)] == first and not set(context.ids[len(first) :]) & set(range(4))
        text = text_of(tokenizer, context.ids[len(first) :], after=[*first, 5])
        assert "  " not in text  # no second space from a tokenizer that begins every text with one
        for ask in context.asks:
            assert not set(ask.prompt) & set(range(4))
    never = Needle(models=["m"], out="unused", lengths=["600"], samples=1, bos="never")
    assert all(0 not in context.ids for context in never.contexts(tokenizer, 512))


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_follows_is_parted_as_inside_the_whole(name, folders):
    """Border by border: where the whole text's tokens have a border, the two parts together are the whole."""
    tokenizer = load(folders(name))
    text = " the cache of text number 3 grows with every token of it:\n\nQuestion"
    whole = document_ids(tokenizer, "so" + text, IdRules("never"))
    compared = 0
    for cut in random.Random(0).sample(range(2, len(text)), 25):
        head, tail = document_ids(tokenizer, ("so" + text)[:cut], IdRules("never")), ("so" + text)[cut:]
        if whole[: len(head)] == head and tail[0] in " \n":
            assert following_ids(tokenizer, tail) == whole[len(head) :]
            compared += 1
    assert compared > 2


@pytest.mark.parametrize(
    ("name", "bos", "first"),
    [
        ("plain", "always", [0]),
        ("plain", "never", []),
        ("bos-and-eos", "always", [0]),
        ("bos-and-eos", "never", []),
        ("llama", "never", []),
    ],
)
def test_bos_can_be_chosen(name, bos, first, folders):
    folder = folders(name)
    alone = expected(BY_NAME[name], folder, TEXT, "alone")
    assert document_ids(load(folder), TEXT, IdRules(bos)) == first + alone


def test_bos_of_a_tokenizer_without_one_is_refused(folders):
    tokenizer = load(folders("plain"))
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="bos='always': the tokenizer has no BOS token"):
        beginning(tokenizer, "always")
    with pytest.raises(ValueError, match="bos='on': choose among auto, always, never"):
        IdRules("on")
    with pytest.raises(ValueError, match="special_tokens='yes': choose among text, control"):
        IdRules(special_tokens="yes")


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_in_a_text_are_control_tokens_when_asked(name, folders):
    tokenizer, control = load(folders(name)), IdRules(special_tokens="control")
    assert following_ids(tokenizer, "a<|im_end|>", control)[-1] == 3
    ids = document_ids(tokenizer, "<s>the cache</s>", control)
    assert ids[0] == 0 and ids.count(0) == 1 and ids[-1] == 1  # BOS is not doubled
    assert 3 not in following_ids(tokenizer, "a<|im_end|>")  # nothing stays behind in the tokenizer


def test_a_token_over_the_border_parts_the_texts(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<end>", "1", "a", "b", "c", "ab"])}
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b")])), eos_token="<end>"
    )
    assert answer_ids(merging, "1a", "c") == ([1, 2], [4])
    assert answer_ids(merging, "1a", "bc") == ([1, 2], [3, 4])


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_read_as_the_text_they_continue(name, folders):
    tokenizer = load(folders(name))
    before, after = "the cache of", " text number 3, and"
    ids = [following_ids(tokenizer, text) for text in (before, after)]
    assert text_of(tokenizer, ids[1], after=ids[0]) == after
    assert text_of(tokenizer, [*ids[1], 1], after=ids[0], special_tokens=False) == after
    assert text_of(tokenizer, [*ids[1], 1], after=ids[0]).endswith("</s>")


def test_half_a_character_is_no_text(folders):
    with pytest.raises(ValueError, match="character 2 is half of a pair"):
        document_ids(load(folders("plain")), "ab\udcff")


def test_tokenizers_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no tokenizer there"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ValueError, match="can't be loaded"):
        load(tmp_path)


def test_evaluations_take_bos_as_an_option(folders, tmp_path):
    done = kvcat(
        *("evaluate", "needle", folders("bos"), "--lengths", 100, "--bos", "sometimes", "--out", tmp_path)
    )
    assert done.exit_code == 2 and "sometimes" in done.output
    windows = tmp_path / "w.json"
    windows.write_text(json.dumps([{"source": "s", "doc": "d", "start": 0, "ids": list(range(30))}]))
    words = ("--windows", windows, "--prefix", 20, "--continuation", 10, "--bos", "never")
    done = kvcat("evaluate", "continuation", folders("bos"), *words, "--out", tmp_path / "r")
    assert done.exit_code == 1 and "holds token ids, which are taken as they are" in done.output
