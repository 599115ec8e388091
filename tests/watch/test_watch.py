"""`kvcat train watch`: what it reads, what it concludes, what a terminal shows."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest
from kvcat_nemo.runs.layout import MANIFEST
from kvcat_nemo.watch.state import HISTORY, History, RunWatcher, duration
from kvcat_nemo.watch.tail import Tail
from kvcat_nemo.watch.view import sparkline

NOW = 1_000_000.0


def line(step, now=NOW, **more):
    figures = {
        "loss/total": 4.0 / step,
        "loss/anchor": 3.0 / step,
        "loss/distill": 0.5,
        "loss/budget": 1.0,
        "keep_rate": 0.5,
        "keep_rate/group0": step / 100,
        "keep_rate/group1": 0.75,
        "tokens_per_second": 1234.5,
        "tflops_per_gpu": 0.0123,
        "step_seconds": 2.0,
        "peak_memory_bytes": 3.2e9,
        "time": now,
    }
    return {"kind": "train", "step": step} | figures | more


def text(*lines):
    return "".join(json.dumps(x) + "\n" for x in lines)


@pytest.fixture
def run(tmp_path):
    """A run of forty steps at its twentieth, with a validation and a checkpoint."""
    folder = tmp_path / "run"
    (folder / "kvcat").mkdir(parents=True)
    config = {"trainer": {"max_steps": 40}, "model": {"kvcat": {"target_keep_fraction": 0.5}}}
    (folder / "kvcat" / "config.json").write_text(json.dumps(config))
    held = {
        "kind": "validation",
        "step": 10,
        "dense_ppl": 20.0,
        "masked_ppl": 30.0,
        "keep_rate": 0.5,
        "time": NOW - 22,
    }
    lines = [line(s, NOW - 2.5 * (20 - s)) for s in range(1, 21)]
    (folder / "kvcat" / "metrics.jsonl").write_text(text(*lines[:10], held, *lines[10:]))
    for name, whole in (("step=10", True), ("step=20", False), ("step=15", True)):
        weights = folder / "checkpoints" / name / "weights"
        weights.mkdir(parents=True)
        if whole:
            (weights / "metadata.json").write_text("{}")
            hash_and_write_manifest(weights.parent, int(name[-2:]))
            os.utime(weights.parent / MANIFEST, (NOW - 30, NOW - 30 + int(name[-2:])))
    (folder / "checkpoints" / "step=15-unfinished").touch()
    still(folder)
    return folder


def still(folder, at=NOW - 500):
    for path in [folder, *folder.rglob("*")]:
        if path.name != MANIFEST:
            os.utime(path, (at, at))


def test_a_running_run(run):
    seen = RunWatcher(run).snapshot(now=NOW + 1)
    assert (seen.status, seen.step, seen.max_steps) == ("running", 20, 40)
    assert seen.seconds_left == pytest.approx(20 * 2.5)  # by the clock, not by step_seconds
    assert seen.tokens_per_second == 1234.5 and seen.validation["dense_ppl"] == 20.0
    assert seen.checkpoint == "step=10" and seen.checkpoint_age == pytest.approx(21)  # whole and finished
    assert [p for p in seen.history["keep_rate/group0"].points] == [(s, s / 100) for s in range(1, 21)]


def test_alive_or_not(run):
    watcher = RunWatcher(run)
    assert watcher.snapshot(now=NOW + 25).status == "running"
    quiet = watcher.snapshot(now=NOW + 125)
    assert quiet.status == "quiet" and "silent for 2 min 5 s where a step takes 2 s" in quiet.detail
    assert quiet.seconds_left is None
    os.utime(run / "checkpoints", (NOW + 120, NOW + 120))  # a save goes on
    saving = watcher.snapshot(now=NOW + 125)
    assert saving.status == "running" and "saving or validating" in saving.detail


def test_finished_is_the_last_step_of_this_run(run):
    (run / "kvcat" / "finished.json").write_text('{"step": 20}')  # of a shorter run that was made longer
    assert RunWatcher(run).snapshot(now=NOW).status == "running"
    with (run / "kvcat" / "metrics.jsonl").open("a") as file:
        file.write(text(*(line(s) for s in range(21, 41))))
    assert RunWatcher(run).snapshot(now=NOW).status == "running"  # the last checkpoint is being written
    (run / "kvcat" / "finished.json").write_text('{"step": 40}')
    assert RunWatcher(run).snapshot(now=NOW + 9999).status == "finished"


def test_missing_then_growing_then_cut_then_resumed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False)
    whole = text(line(1), line(2))
    path.write_text(whole + '{"kind": "tra')
    lines, _ = tail.read()
    assert [x["step"] for x in lines] == [1, 2]
    with path.open("a") as file:
        file.write(json.dumps(line(3))[len('{"kind": "tra') :])
    assert tail.read() == ([], False)  # the line's end is not there yet
    with path.open("a") as file:
        file.write("\n" + "garbage\n" + text(line(4)))
    lines, again = tail.read()
    assert ([x["step"] for x in lines], again) == ([3, 4], False)
    with path.open("r+") as file:
        file.truncate(len(text(line(1))))
    lines, again = tail.read()
    assert ([x["step"] for x in lines], again) == ([1], True)
    other = tmp_path / "other"
    other.write_text(text(line(1), line(2), line(3), line(4), line(5)))
    os.replace(other, path)  # as a resumed run does it
    lines, again = tail.read()
    assert ([x["step"] for x in lines], again) == ([1, 2, 3, 4, 5], True)
    path.unlink()
    assert tail.read() == ([], True)
    assert tail.read() == ([], False)


def test_a_resumed_run_forgets_the_lost_steps(run):
    watcher = RunWatcher(run)
    assert watcher.snapshot(now=NOW).step == 20
    path = run / "kvcat" / "metrics.jsonl"
    kept = [x for x in path.read_text().splitlines(keepends=True) if json.loads(x)["step"] <= 10]
    (run / "new").write_text("".join(kept))
    os.replace(run / "new", path)
    seen = watcher.snapshot(now=NOW)
    assert seen.step == 10 and len(seen.history["keep_rate"].points) == 10


@pytest.mark.parametrize("broken", ["nothing", "folder", "empty", "garbage"])
def test_whatever_is_there(tmp_path, broken):
    folder = tmp_path / "run"
    if broken != "nothing":
        (folder / "kvcat").mkdir(parents=True)
    if broken == "empty":
        (folder / "kvcat" / "metrics.jsonl").touch()
    if broken == "garbage":
        (folder / "kvcat" / "metrics.jsonl").write_bytes(b'\xff\xfe{}\n[]\n{"kind": 3, "step": 1}\n')
        (folder / "kvcat" / "config.json").write_text("{")
    done = CliRunner().invoke(main, ["train", "watch", str(folder), "--once"])
    assert done.exit_code == 0, done.output
    assert ("not there yet" if broken == "nothing" else "starting") in done.output


def test_history_of_any_length_is_bounded():
    history = History()
    for step in range(50_000):
        history.add(step, float(step))
    assert HISTORY / 2 <= len(history.points) <= HISTORY
    gaps = {b[0] - a[0] for a, b in zip(history.points, history.points[1:], strict=False)}
    assert len(gaps) == 1 and history.points[0][0] == 0 and history.points[-1][0] > 49_000


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0.0, 1.0], 8, 0.0, 1.0) == "▁█" and sparkline([0.5], 8, 0.0, 1.0) in "▄▅"
    assert sparkline([0] * 50 + [7] * 50, 10) == "▁▁▁▁▁█████"
    assert sparkline([], 8) == "" and sparkline([3.0, 3.0], 8) == "▁▁" and sparkline([2, -1], 4, 0, 1) == "█▁"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.01, "0 s"),
        (0.35, "0.35 s"),
        (9.6, "9.6 s"),
        (59.7, "1 min"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_once_prints_everything(run):
    done = CliRunner(env={"COLUMNS": "110"}).invoke(main, ["train", "watch", str(run), "--once"])
    assert done.exit_code == 0
    for words in (
        "step 20 of 40",
        "distill: KL(dense ‖ masked)",
        "router 0",
        "router 1",
        "0.7500",
        "1,234 tokens/s",
        "0.0123 TFLOP/s",
        "peak 3.2 GB",
        "checkpoint step=10",
        "keep rate (target 0.5)",
        "perplexity dense 20.00, masked 30.00",
        "silent for",  # NOW is long ago
    ):
        assert words in done.output, words
    router = next(x for x in done.output.splitlines() if "router 0" in x)
    assert re.search("▁+▂*", router)


def _listen_to_the_terminal():
    """So that ^C reaches the process, and means something even where the tests run in the background and ignore it."""
    ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A command in a pseudo-terminal of 100 columns."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from kvcat_nemo.cli import main; main()", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=_listen_to_the_terminal,
        )
        os.close(slave)
        self.output = ""

    def until(self, words, seconds=30):
        deadline = time.monotonic() + seconds
        while words not in self.output:
            assert time.monotonic() < deadline, self.output[-3000:]
            if select.select([self.master], [], [], 0.1)[0]:
                self._read()

    def _read(self):
        with contextlib.suppress(OSError):
            self.output += os.read(self.master, 65536).decode("utf-8", "replace")

    def end(self, seconds=10):
        """The exit code; what it still prints is read, or it would wait for that."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.master], [], [], 0.1)[0]:
                self._read()
        return self.process.poll()

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_live_in_a_terminal(tmp_path):
    """From a folder that is not there to a finished run, with the job writing meanwhile."""
    folder = tmp_path / "run"
    terminal = Terminal("train", "watch", str(folder), "--every", "0.05")
    try:
        terminal.until("not there yet")
        (folder / "kvcat").mkdir(parents=True)
        (folder / "kvcat" / "config.json").write_text('{"trainer": {"max_steps": 30}}')
        with (folder / "kvcat" / "metrics.jsonl").open("a", buffering=1) as file:
            for step in range(1, 16):
                file.write(text(line(step, time.time(), step_seconds=0.02)))
                time.sleep(0.02)
            terminal.until("step 15 of 30")
            terminal.until("router 1")
            for step in range(16, 31):
                file.write(text(line(step, time.time())))
        (folder / "kvcat" / "finished.json").write_text('{"step": 30}')
        terminal.until("finished at step 30")
        assert terminal.end() == 0 and "Traceback" not in terminal.output
    finally:
        terminal.close()


def test_ctrl_c_ends_it_quietly(run):
    terminal = Terminal("train", "watch", str(run), "--every", "0.05")
    try:
        terminal.until("step 20 of 40")
        os.write(terminal.master, b"\x03")
        assert terminal.end() == 0 and "Traceback" not in terminal.output
    finally:
        terminal.close()
