"""The newest checkpoints stay, and the best; what is removed stops counting first."""

import os
import shutil

import pytest

from kvcat_nemo.runs import checkpoint_manifest as manifest
from kvcat_nemo.runs import checkpoints, retention
from kvcat_nemo.runs.layout import BASE, RECORD


def make(folder, step):
    path = folder / f"step={step}"
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "__0_0.distcp").write_bytes(bytes(step))
    # Whatever a save writes beside the weights.
    for name in (RECORD, BASE, "context/model.yaml", ".hashes-0.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    manifest.write_manifest(path, step, manifest.hash_files(path, manifest.contents(path)))
    return path


def steps(folder):
    assert not list(folder.glob("*-broken")), "what a save writes is removed, not set aside"
    return sorted(f.step for f in checkpoints.complete(folder))


def tidy(folder, scores, last=2, best=True):
    retention.tidy(folder, scores, keep_last=last, keep_best=best, metrics=["masked_ppl", "dense_ppl"])


def test_newest_and_best(tmp_path):
    for step in (4, 8, 12, 16):
        make(tmp_path, step)
    scores = {
        4: ("masked_ppl", 9.0),
        8: ("masked_ppl", 7.0),
        12: ("masked_ppl", 8.0),
        20: ("masked_ppl", 1.0),
    }
    tidy(tmp_path, scores)
    assert steps(tmp_path) == [8, 12, 16] and (tmp_path / "last").resolve().name == "step=16"
    assert list(scores) == [20]  # its checkpoint is not there yet
    make(tmp_path, 20)
    tidy(tmp_path, scores)
    assert steps(tmp_path) == [16, 20] and not scores


@pytest.mark.parametrize(
    ("last", "best", "left"), [(1, True, [8, 16]), (1, False, [16]), (3, True, [8, 12, 16])]
)
def test_counts(tmp_path, last, best, left):
    for step in (4, 8, 12, 16):
        make(tmp_path, step)
    tidy(tmp_path, {8: ("dense_ppl", 1.0), 4: ("dense_ppl", 2.0)}, last, best)
    assert steps(tmp_path) == left


def test_nothing_there_and_nothing_scored(tmp_path):
    tidy(tmp_path, {})
    assert not (tmp_path / "last").exists()
    make(tmp_path, 4)
    tidy(tmp_path, {})
    assert steps(tmp_path) == [4]


def test_the_later_one_of_equals(tmp_path):
    found = [make(tmp_path, s) for s in (4, 8)]
    for path in found:
        retention.write_score(path, "masked_ppl", 3.0)
    assert retention.best_of(checkpoints.complete(tmp_path), ["masked_ppl"]) == found[1]


def test_a_removal_that_fails_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    path = make(tmp_path, 4)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)
    retention.remove(path)
    assert path.exists() and steps(tmp_path) == []


def test_a_full_disk_costs_nothing(tmp_path, monkeypatch):
    for step in (4, 8, 12):
        make(tmp_path, step)

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        tidy(tmp_path, {12: ("masked_ppl", 1.0)})
    assert steps(tmp_path) == [4, 8, 12]
