"""What a change of settings does to a run's order of windows: refused, said, or nothing."""

import copy
import shutil

import numpy as np
import pytest

from kvcat_nemo.data.run_order import EPOCHS, MEGATRON, changes, check_parts, refusal, splits_of
from kvcat_nemo.data.window_counts import contents, epochs_needed, split_shares, windows_in

RECORD = {
    "format": 1, "index": EPOCHS, "seed": 1, "seq_length": 8, "train_windows": 100, "validation_windows": 4,
    "global_batch_size": 4, "packed_documents": False, "eod_mask_loss": False, "eod": 0,
    "train": [{"prefix": "a", "weight": 0.5, "share": [0.0, 0.9], "documents": 9, "tokens": 900, "digest": "A"},
              {"prefix": "b", "weight": 0.5, "share": [0.0, 0.9], "documents": 9, "tokens": 900, "digest": "B"}],
    "validation": [{"prefix": "a", "weight": None, "share": [0.9, 1.0], "documents": 1, "tokens": 100, "digest": "A"}],
}  # fmt: skip


def changed(path, value):
    record = copy.deepcopy(RECORD)
    *parents, last = path
    place = record
    for key in parents:
        place = place[key]
    place[last] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["seed"], 2, "data.seed"),
        (["seq_length"], 16, "data.seq_length"),
        (["train", 0, "digest"], "C", "data.paths"),
        (["train", 0, "weight"], 0.6, "data.paths (weights"),
        (["train", 1, "share"], [0.0, 0.8], "data.split"),
        (["train"], RECORD["train"][:1], "data.paths"),
        (["train"], RECORD["train"][::-1], "data.paths"),
        (["index"], "recall", "data"),
    ],
)
def test_another_order_is_refused_by_name(path, value, field):
    found = changes(RECORD, changed(path, value))
    assert any(change.refused and change.field.startswith(field) for change in found), found
    message = refusal(found, "RUN/checkpoints/step=4")
    assert (
        message.startswith(field)
        and "data.on_change=say" in message
        and "resume.base=RUN/checkpoints/step=4" in message
    )


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["global_batch_size"], 8, "data.global_batch_size"),
        (["validation_windows"], 8, "windows of a validation"),
        (["validation", 0, "digest"], "C", "data.paths (the validation part)"),
        (["validation", 0, "share"], [0.8, 1.0], "data.split (the validation part)"),
        (["packed_documents"], True, "data.packed_documents"),
        (["eod_mask_loss"], True, "data.eod_mask_loss"),
        (["eod"], 2, "data.tokenizer"),
    ],
)
def test_what_leaves_the_order_is_said(path, value, field):
    found = changes(RECORD, changed(path, value))
    assert [c.field.startswith(field) for c in found] == [True] and refusal(found, "x") is None
    assert repr(value) in str(found[0]) or "digest" in path


@pytest.mark.parametrize(
    "path", [["train_windows"], ["train", 0, "prefix"], ["validation", 0, "prefix"]], ids=str
)
def test_more_steps_and_files_elsewhere_change_nothing(path):
    assert changes(RECORD, changed(path, 10**6 if path == ["train_windows"] else "elsewhere")) == []


def test_megatrons_own_order_hangs_on_the_number_of_windows():
    old = changed(["index"], MEGATRON)
    longer = old | {"train_windows": 200}
    assert "trainer.max_steps" in refusal(changes(old, longer), "x")
    assert changes(old, old) == []
    one = old | {"train": [RECORD["train"][0] | {"weight": None}]}
    assert (
        changes(one, one | {"train_windows": 110}) == []
    )  # 110 windows of 8: within the epoch of 900 tokens
    assert refusal(changes(one, one | {"train_windows": 113}), "x")


def test_a_later_versions_record_is_refused():
    with pytest.raises(ValueError, match="format 2; this version reads 1"):
        changes(RECORD | {"format": 2}, RECORD)


@pytest.mark.parametrize("split", ["", "a,b", "0,0", "-1,2", "nan,1", "1,2,3,4", "inf,1", None])
def test_splits_that_are_none(split):
    with pytest.raises(ValueError, match="data.split="):
        split_shares(split)


def test_shares_are_megatrons():
    from megatron.core.datasets import blended_megatron_dataset_config as megatron

    for split in ("980,20,0", "900,50,50", "1", "99,1", "0.1,0.2,0.7", "0,100,0"):
        theirs = megatron.convert_split_vector_to_split_matrix(megatron.parse_and_normalize_split(split))
        assert [None if x is None else pytest.approx(x) for x in theirs] == split_shares(split)


@pytest.fixture
def corpus(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{tmp_path / 'a'}.bin", dtype=np.int32)
    for length in (5, 0, 7, 0, 0):
        builder.add_document(np.arange(length), [length])
    builder.finalize(f"{tmp_path / 'a'}.idx")
    return str(tmp_path / "a")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("split", "wanted", "message"),
    [
        ("1,1,0", {"train": 1}, None),
        ("60,40,0", {"train": 1, "validation": 1}, "validation split of .* has no token"),
        ("60,40,0", {"train": 1, "validation": 0}, None),
        ("60,40,0", {"train": 1, "validation": None}, "a pass over it"),
        ("1,9,0", {"train": 1, "validation": 1}, "train split"),
        ("1", {"train": 10**9}, "would be read"),
        ("1", {"train": 10**18}, "would be read"),
    ],
)
def test_splits_without_tokens_are_found_before_anything_is_built(corpus, split, wanted, message):
    splits = splits_of(([corpus], None), None, split)
    wanted = {"validation": 0, "test": 0} | wanted
    if message is None:
        return check_parts(splits, wanted, 4)
    with pytest.raises(ValueError, match=message):
        check_parts(splits, wanted, 4)


def test_contents_are_told_apart_wherever_they_lie(corpus, tmp_path):
    (tmp_path / "other").mkdir()
    for ending in (".idx", ".bin"):
        shutil.copy(corpus + ending, tmp_path / "other" / f"b{ending}")
    moved = str(tmp_path / "other" / "b")
    assert contents(moved) == contents(corpus)
    data = bytearray((tmp_path / "other" / "b.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "other" / "b.bin").write_bytes(data)
    assert contents(moved) != contents(corpus)


def test_epochs_needed():
    for tokens in (1, 7, 8, 9, 100):
        for windows in (1, 2, 5, 50):
            epochs = epochs_needed(windows, tokens, 8, what="x")
            assert windows_in(epochs, tokens, 8) >= windows and (
                epochs == 1 or windows_in(epochs - 1, tokens, 8) < windows
            )
