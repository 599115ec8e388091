"""Ranks that do not answer are named, with their hosts, within the time limit: before a run and in the middle of it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcat_nemo.engine.reach import place_from_environment

pytestmark = pytest.mark.multiprocess
RANK = Path(__file__).with_name("reach_rank.py")
HOST = socket.gethostname()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(arguments, ranks, world, **more):
    port = free_port()
    out = []
    for rank in ranks:
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **{k: str(v) for k, v in more.items()},
        }
        out.append(
            subprocess.Popen(
                [sys.executable, str(RANK), *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return out


def finish(processes, seconds=60):
    try:
        texts = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return texts


def test_all_answer():
    processes = start(["reach", 30], range(3), 3)
    texts = finish(processes)
    assert [p.returncode for p in processes] == [0, 0, 0], texts
    assert all(f"3 ranks on 1 host(s) ({HOST}) over gloo" in t for t in texts)


def test_one_was_never_started():
    began = time.monotonic()
    processes = start(["reach", 4], [0, 2], 3)
    texts = finish(processes)
    assert [p.returncode for p in processes] == [1, 1]
    assert all(f"rank 1 (host {HOST}) did not start within 4 s" in t for t in texts), texts
    assert time.monotonic() - began < 25


def test_rank_0_was_never_started():
    processes = start(["reach", 3], [1], 2)
    (text,) = finish(processes)
    assert processes[0].returncode == 1 and "rank 0 does not answer at 127.0.0.1:" in text, text


def test_one_hangs_in_the_sum(tmp_path):
    processes = start(["reach", 5], range(3), 3)
    # It starts and freezes: what a host with a broken network card looks like from outside.
    victim = processes[2]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not _sleeps_in_python(victim.pid):
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        texts = finish(processes[:2])
    finally:
        victim.kill()
        victim.communicate()
    if any(p.returncode == 0 for p in processes[:2]):
        pytest.fail(f"the rank was through before it was stopped: {texts}")
    assert all(f"rank 2 (host {HOST}) did not" in t for t in texts), texts


def _sleeps_in_python(pid):
    """Whether torch is loaded: the rank is about to make itself known."""
    try:
        return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


# Rank 0 holds the store.
@pytest.mark.parametrize(
    ("act", "victim"), [("killed", 0), ("killed", 2), ("frozen", 0), ("failed", 0), ("failed", 2)]
)
def test_who_died_is_named(act, victim):
    processes = start([act], range(3), 3, VICTIM=victim)
    others = [p for r, p in enumerate(processes) if r != victim]
    began = time.monotonic()
    texts = finish(others, 60)
    processes[victim].kill()
    processes[victim].communicate()
    assert all(p.returncode in (3, 69) for p in others), [p.returncode for p in others]
    assert time.monotonic() - began < 45
    for text in texts:
        assert f"rank {victim} (host {HOST}" in text, text
        assert act != "failed" or "a bug of its own" in text


def test_ranks_that_end_in_good_order_are_not_missed():
    processes = start(["done"], range(2), 2, VICTIM=9)
    texts = finish(processes)
    assert [p.returncode for p in processes] == [0, 0] and all("good order" in t for t in texts), texts


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
