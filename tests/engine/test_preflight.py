"""Ranks that do not answer are named, with their hosts, within the time limit: before a run and in the middle of it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcat_nemo.engine.preflight import place_from_environment

pytestmark = pytest.mark.multiprocess
HOST = socket.gethostname()


def run(folder, what, world=3, ranks=None, victim=None, **more):
    """Exit codes and outputs of the ranks that came back, and the seconds it took."""
    job = {"what": what, "world": world, "ranks": ranks or list(range(world)), "victim": victim, **more}
    (folder / "job.json").write_text(json.dumps(job))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("preflight_rank.py")), str(folder / "job.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    codes = {int(r): code for r, code in json.loads((folder / "codes.json").read_text()).items()}
    codes.pop(victim, None)
    return codes, {r: (folder / f"rank-{r}.txt").read_text() for r in codes}, time.monotonic() - began


def test_all_answer(tmp_path):
    codes, texts, _ = run(tmp_path, "reach", seconds=30)
    assert set(codes.values()) == {0}, texts
    assert all(f"3 ranks on 1 host(s) ({HOST}) over gloo" in t for t in texts.values())


def test_one_was_never_started(tmp_path):
    codes, texts, seconds = run(tmp_path, "reach", ranks=[0, 2], seconds=3)
    assert codes == {0: 1, 2: 1} and seconds < 40
    assert all(f"rank 1 (host {HOST}) did not start within 3 s" in t for t in texts.values()), texts


def test_rank_0_was_never_started(tmp_path):
    codes, texts, _ = run(tmp_path, "reach", world=2, ranks=[1], seconds=2)
    assert codes == {1: 1} and "rank 0 does not answer at 127.0.0.1:" in texts[1], texts


def test_one_hangs_in_the_sum(tmp_path):
    codes, texts, seconds = run(tmp_path, "reach", victim=2, seconds=4)
    assert codes == {0: 1, 1: 1} and seconds < 60
    words = f"rank 2 (host {HOST}) did not come back from the gloo all-reduce within 4 s"
    assert all(words in t for t in texts.values()), texts


# Rank 0 holds the store.
@pytest.mark.parametrize(
    ("act", "victim"),
    [("killed", 0), ("killed", 2), ("frozen", 0), ("frozen", 2), ("failed", 0), ("failed", 2)],
)
def test_who_died_is_named(tmp_path, act, victim):
    codes, texts, seconds = run(tmp_path, "line", victim=victim, act=act)
    assert len(codes) == 2 and set(codes.values()) <= {3, 69} and seconds < 45, codes
    for text in texts.values():
        assert f"rank {victim} (host {HOST}" in text, text
        assert act != "failed" or "a bug of its own" in text, text


def test_ranks_that_end_in_good_order_are_not_missed(tmp_path):
    codes, texts, _ = run(tmp_path, "line", world=2, act="done")
    assert codes == {0: 0, 1: 0} and all("good order" in t for t in texts.values()), texts


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK is not"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number"),
    ],
)
def test_incomplete_environment_is_refused(monkeypatch, variables, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        place_from_environment()


def test_slurm_names_the_place(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "MASTER_ADDR": "n0",
    }.items():
        monkeypatch.setenv(name, value)
    place = place_from_environment()
    assert (place.rank, place.world_size, place.local_rank) == (3, 4, 1)
