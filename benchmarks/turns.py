"""Forms that are measured against each other: each in a process of its own, taking turns.

A process of its own makes peak memory the form's own; turns let a busy moment of the machine meet every form.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def take_turns(
    script: str, forms: dict[str, Sequence[str]], rounds: int, threads: int
) -> dict[str, list[dict]]:
    """Start every form, then run each in turn, `rounds` times, forwards and backwards.

    Args:
        script: the file to run; forms: name → its arguments, for which it must call `serve`.

    Returns:
        each form's answers, in order.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    answers: dict[str, list[dict]] = {name: [] for name in forms}
    workers = {}
    try:
        for name, arguments in forms.items():
            workers[name] = subprocess.Popen(
                [sys.executable, script, *arguments],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        for turn in range(rounds):
            for name in list(forms)[:: 1 if turn % 2 == 0 else -1]:
                worker = workers[name]
                worker.stdin.write("run\n")
                worker.stdin.flush()
                line = worker.stdout.readline()
                if not line:
                    raise RuntimeError(f"{script} {' '.join(forms[name])} ended with {worker.wait()}")
                answers[name].append(json.loads(line))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return answers


def serve(run: Callable[[], dict]) -> None:
    """The worker's end: run once for every line of standard input, answer with figures, wall time and peak memory."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    for _ in sys.stdin:
        reset_peak()
        before, cpu, began = memory("VmRSS"), time.process_time(), time.perf_counter()
        figures = run()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = memory("VmHWM")
        figures |= {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "peak_bytes": peak - before,
            "resident_bytes": peak,
        }
        # Freed memory goes back before the next form's turn: all forms at their peak would not fit together.
        ctypes.CDLL(None).malloc_trim(0)
        answers.write(json.dumps(figures) + "\n")
        answers.flush()


def require_linux() -> None:
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is read from /proc, which only Linux has")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now


def memory(field: str) -> int:
    """Bytes of this process by a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def write_report(rows: list[dict], out: Path, began: float, **facts) -> None:
    """The rows and a manifest as JSON, whole or not at all."""
    from kvcat_nemo.data.files import new_file
    from kvcat_nemo.manifest import manifest

    facts |= {"load": [round(x, 2) for x in os.getloadavg()], "seconds": round(time.time() - began, 1)}
    with new_file(out) as file:
        file.write_text(json.dumps({"manifest": manifest(**facts), "rows": rows}, indent=1) + "\n")


def save_figure(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
