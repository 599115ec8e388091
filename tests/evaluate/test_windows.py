import json

import pytest

from kvcat_nemo.data.reading import Document
from kvcat_nemo.data.split import position
from kvcat_nemo.data.tokenizer import load_tokenizer
from kvcat_nemo.evaluate.windows import (
    Window,
    corpora_from_files,
    cut_windows,
    load_windows,
    windows_fingerprint,
    write_windows,
)

WORDS = [f"w{i}" for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    """One token a word: `w7` is id 7; 400 ends a document, 401 begins a text where the tokenizer is asked to."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*WORDS, "<end>", "<begin>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<begin>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def document(name, first, words):
    return Document(name, " ".join(WORDS[first : first + words]))


CORPORA = {
    "long": [document("a", 0, 95), document("b", 100, 37)],
    "short": [document("c", 200, 9), document("d", 210, 20), document("e", 240, 10), document("f", 260, 15)],
}


def cut(tokenizer, count, **options):
    return cut_windows(CORPORA, tokenizer, count, **{"length": 10, "min_chars_per_token": 0, **options})


def test_windows_are_the_documents_tokens_at_their_place(tokenizer):
    texts = {d.id: [int(w[1:]) for w in d.text.split()] for documents in CORPORA.values() for d in documents}
    for window in cut(tokenizer, 12):
        assert window.ids == texts[window.doc][window.start : window.start + 10]


def test_corpora_and_documents_take_turns_and_no_two_windows_overlap(tokenizer):
    windows = cut(tokenizer, 16)
    assert [w.source for w in windows[:8]] == ["long", "short"] * 4
    assert {w.doc for w in windows if w.source == "short"} == {"d", "e", "f"}  # c is too short for a window
    assert [w.doc for w in windows if w.source == "short"][:3] != [
        w.doc for w in windows if w.source == "short"
    ][1:4]
    assert {w.doc for w in windows[:6] if w.source == "short"} == {"d", "e", "f"}
    assert {w.doc for w in windows[:4] if w.source == "long"} == {"a", "b"}
    assert len({(w.doc, w.start) for w in windows}) == 16 and not any(w.start % 10 for w in windows)


def test_a_larger_count_begins_with_the_smaller_one_and_seeds_differ(tokenizer):
    assert cut(tokenizer, 16)[:5] == cut(tokenizer, 5) == cut(tokenizer, 5)
    assert cut(tokenizer, 5) != cut(tokenizer, 5, seed=1)


def test_too_little_text_is_said(tokenizer):
    with pytest.raises(ValueError, match="hold only 16 windows of 10 tokens, 17 were asked for"):
        cut(tokenizer, 17)
    with pytest.raises(ValueError, match="corpus 'short': no window of 30 tokens of text"):
        cut(tokenizer, 2, length=30)
    for options, message in (
        ({"count": 0}, "count is 0"),
        ({"length": 1}, "length is 1"),
        ({"held_out": 0}, "held_out is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            cut(tokenizer, **{"count": 1, **options})


def test_windows_of_few_characters_a_token_are_passed_over(tokenizer):
    # Words below w10 have 2 characters and a blank, those below w100 one more: a's first window alone is too poor.
    windows = cut_windows({"long": CORPORA["long"]}, tokenizer, 11, length=10, min_chars_per_token=3)
    assert ("a", 0) not in {(w.doc, w.start) for w in windows}
    assert ("a", 0) in {
        (w.doc, w.start)
        for w in cut_windows({"x": CORPORA["long"]}, tokenizer, 12, length=10, min_chars_per_token=0)
    }


def test_only_documents_kept_out_of_training_are_used(tokenizer):
    places = {d.id: position(d.text, 7) for documents in CORPORA.values() for d in documents}
    share = sorted(places.values())[-2]  # leaves the last two documents out
    windows = cut_windows(
        {"all": sum(CORPORA.values(), [])},
        tokenizer,
        6,
        length=10,
        min_chars_per_token=0,
        held_out=share,
        split_seed=7,
    )
    assert {w.doc for w in windows} <= {name for name, place in places.items() if place < share}


def test_a_begin_token_takes_the_first_place(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend.post_processor = TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 401)]
    )
    for window in cut(tokenizer, 4):
        assert window.ids[0] == 401 and len(window.ids) == 10 and window.start % 9 == 0
        assert 401 not in window.ids[1:]


def test_the_file_is_as_described_and_comes_back(tokenizer, tmp_path):
    windows = cut(tokenizer, 5)
    path = write_windows(windows, tmp_path / "w.json")
    value = json.loads(path.read_text())
    assert [list(record) for record in value] == [["source", "doc", "start", "ids"]] * 5
    assert load_windows(path, length=10, vocab_size=400) == windows == load_windows(path, length=None)
    assert windows_fingerprint(windows) != windows_fingerprint(windows[::-1])


GOOD = {"source": "s", "doc": "d", "start": 0, "ids": [1, 2, 3]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "at least one; got list"),
        ("{}", "must be a list of windows"),
        (json.dumps([3]), "window 0 .*must be an object"),
        *(
            (json.dumps([GOOD, {k: v for k, v in GOOD.items() if k != f}]), f"window 1 .*no field '{f}'")
            for f in GOOD
        ),
        (json.dumps([{**GOOD, "start": "0"}]), "'start' must be int, is str"),
        (json.dumps([{**GOOD, "start": True}]), "'start' must be int, is bool"),
        (json.dumps([{**GOOD, "ids": [1, 2]}]), "has 2 ids, 3 wanted"),
        (json.dumps([{**GOOD, "ids": [1, 2.0, 3]}]), r"ids\[1\] is 2.0, not a token id"),
        (json.dumps([{**GOOD, "ids": [1, -1, 3]}]), r"ids\[1\] is -1"),
        (json.dumps([{**GOOD, "ids": [1, 2, 9]}]), r"ids\[2\] is 9, the model's vocabulary has 9"),
    ],
)
def test_other_peoples_files_are_checked(tmp_path, content, message):
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_windows(path, length=3, vocab_size=9)


def test_files_of_mixed_lengths_and_missing_ones_are_refused(tmp_path):
    path = tmp_path / "w.json"
    with pytest.raises(ValueError, match="no such file; `kvcat data windows` makes one"):
        load_windows(path)
    path.write_text(json.dumps([GOOD, {**GOOD, "ids": [1]}]))
    with pytest.raises(ValueError, match="window 1 .*has 1 ids, 3 wanted"):
        load_windows(path, length=None)
    path.write_text(json.dumps([[1]]))
    with pytest.raises(ValueError, match="window 0 .*must be an object"):
        load_windows(path, length=None)


def test_local_files_become_corpora_by_name(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text(folder)
    corpora = corpora_from_files(
        [tmp_path / "one" / "book.txt", tmp_path / "two" / "book.txt", tmp_path / "two"]
    )
    assert {n: [d.text for d in ds] for n, ds in corpora.items()} == {
        "book": ["one"],
        "book-2": ["two"],
        "two": ["two"],
    }


def test_the_window_type_has_the_fields_of_the_file():
    assert list(Window.__dataclass_fields__) == ["source", "doc", "start", "ids"]


def test_the_command_cuts_windows_from_local_text(tokenizer_dir, tmp_path):
    from click.testing import CliRunner

    from kvcat_nemo.cli import main

    (tmp_path / "book.txt").write_text(" ".join(WORDS[100:200]))
    words = [
        "data",
        "windows",
        tmp_path / "book.txt",
        "--tokenizer",
        tokenizer_dir,
        "--count",
        3,
        "--length",
        20,
    ]
    done = CliRunner().invoke(main, [str(word) for word in (*words, "--out", tmp_path / "w.json")])
    assert done.exit_code == 0, done.output
    assert "3 windows of 20 tokens (3 from book)" in done.output
    assert len(load_windows(tmp_path / "w.json", length=20, vocab_size=400)) == 3
    wrong = CliRunner().invoke(
        main, [str(word) for word in (*words[:-1], 2000, "--out", tmp_path / "x.json")]
    )
    assert wrong.exit_code == 1 and "corpus 'book': no window of 2000 tokens" in wrong.output
