"""A checkpoint counts when its manifest is written, and its files are what the manifest says."""

import json
import os

import pytest

from kvcat_nemo.runs import checkpoint_manifest as manifest
from kvcat_nemo.runs import checkpoints, retention
from kvcat_nemo.runs.integrity import examine
from kvcat_nemo.runs.layout import BROKEN


def make(folder, name="step=4", step=4):
    path = folder / name
    (path / "weights").mkdir(parents=True)
    (path / "weights" / "__0_0.distcp").write_bytes(b"a" * 5000)
    (path / "weights" / "__1_0.distcp").write_bytes(b"b" * 3000)
    (path / "weights" / "common.pt").write_bytes(b"c" * 100)
    (path / "context").mkdir()
    (path / "context" / "io.json").write_text("{}")
    manifest.write_manifest(path, step, manifest.hash_files(path, manifest.contents(path)), world_size=2)
    return path


def test_the_manifest_lists_every_file(tmp_path):
    found = manifest.read_manifest(make(tmp_path))
    assert found.step == 4 and found.bytes == 8102 and found.facts == {"world_size": 2}
    assert set(found.files) == {
        "weights/__0_0.distcp",
        "weights/__1_0.distcp",
        "weights/common.pt",
        "context/io.json",
    }


def test_whole(tmp_path):
    path = make(tmp_path)
    assert examine(path).whole
    assert [f.path for f in checkpoints.complete(tmp_path)] == [path]


@pytest.mark.parametrize("parts", [1, 3])
def test_one_flipped_bit_is_found_by_exactly_one_part(tmp_path, parts):
    path = make(tmp_path)
    victim = path / "weights" / "__1_0.distcp"
    raw = bytearray(victim.read_bytes())
    raw[1234] ^= 1
    victim.write_bytes(raw)
    found = [examine(path, part=i, parts=parts).lines for i in range(parts)]
    assert sum(map(len, found)) == 1
    assert str(victim) in next(f[0] for f in found if f) and examine(path, hashes=False).whole


def test_truncated_and_missing(tmp_path):
    path = make(tmp_path)
    os.truncate(path / "weights" / "__0_0.distcp", 4999)
    (path / "context" / "io.json").unlink()
    found = "\n".join(examine(path, hashes=False).lines)
    assert "__0_0.distcp: 4,999 bytes, saved with 5,000 (truncated?)" in found and "io.json: missing" in found
    assert checkpoints.survey(tmp_path)[0].damaged


def test_without_a_manifest_marked_and_unreadable(tmp_path):
    no_manifest, marked, bad = (
        make(tmp_path, "step=1", 1),
        make(tmp_path, "step=2", 2),
        make(tmp_path, "step=3", 3),
    )
    (no_manifest / manifest.MANIFEST).unlink()
    marked.with_name("step=2-unfinished").touch()
    (bad / manifest.MANIFEST).write_text('{"step": 3, "fi')
    for path in (no_manifest, marked):
        with pytest.raises(manifest.Incomplete, match=path.name):
            manifest.read_manifest(path)
    with pytest.raises(manifest.Damaged, match="step=3"):
        manifest.read_manifest(bad)
    assert checkpoints.complete(tmp_path) == []
    assert [f.damaged for f in sorted(checkpoints.survey(tmp_path), key=lambda f: f.path.name)] == [
        False,
        False,
        True,
    ]


def test_newest_first_and_links_and_set_aside_ones_left_out(tmp_path):
    for step in (8, 16, 12):
        make(tmp_path, f"step={step}", step)
    make(tmp_path, f"step=20{BROKEN}", 20)
    (tmp_path / "last").symlink_to("step=16")
    assert [f.step for f in checkpoints.complete(tmp_path)] == [16, 12, 8]


def test_a_file_that_nobody_hashed_prevents_the_manifest(tmp_path):
    path = make(tmp_path)
    files = manifest.read_manifest(path).files
    (path / "weights" / "__2_0.distcp").write_bytes(b"x")
    with pytest.raises(manifest.Damaged, match="__2_0"):
        manifest.write_manifest(path, 4, files)


def test_owner_is_the_rank_that_wrote():
    assert manifest.owner("weights/__3_1.distcp", 4) == 3
    assert manifest.owner("weights/common.pt", 4) == 0 and manifest.owner("weights/.metadata", 4) == 0


def test_score(tmp_path):
    path = make(tmp_path)
    assert retention.read_score(path, "masked_ppl") is None
    retention.write_score(path, "masked_ppl", 12.5)
    assert (
        retention.read_score(path, "masked_ppl") == 12.5 and retention.read_score(path, "dense_ppl") is None
    )
    assert examine(path).whole  # it is no part of the manifest
    assert json.loads((path / manifest.MANIFEST).read_text())["step"] == 4
