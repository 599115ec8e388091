"""Forms that are measured against each other: each in a process of its own, taking turns.

A process of its own makes peak memory the form's own; turns let a busy moment of the machine meet every form. Forms that do not
compute the same are not timed: after the first turn their answers are compared (`agree`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Disagree(RuntimeError):
    """A form's results are not those of the form that it is compared with."""


def digest(*tensors) -> list[float]:
    """Of each tensor the norm, and the sum of its elements with signs drawn from a fixed seed: two figures to compare it by.

    A wrong element moves the second as much as it is wrong; the first is its scale.
    """
    import torch

    out = []
    for tensor in tensors:
        flat = tensor.detach().double().flatten()
        signs = (
            torch.randint(0, 2, flat.shape, generator=torch.Generator().manual_seed(1))
            .double()
            .mul_(2)
            .sub_(1)
        )
        out += [float(flat.norm()), float(flat @ signs)]
    return out


def compare(answers: dict[str, dict], agree: Sequence[tuple[str, str, float]]) -> None:
    """Compare forms' `check`, a `digest`, two by two.

    Args:
        answers: form → its answer; agree: form, the form to be like, and how far a figure may be off, relative to the norm.

    Raises:
        Disagree: naming both forms and the figures.
    """
    for ours, theirs, bound in agree:
        pairs = zip(answers[ours]["check"], answers[theirs]["check"], strict=True)
        for number, (mine, other) in enumerate(pairs):
            scale = answers[theirs]["check"][number // 2 * 2]
            if not abs(mine - other) <= bound * abs(scale):  # NaN is not
                raise Disagree(
                    f"{ours} is not timed: figure {number} of its results is {mine!r}, that of {theirs} {other!r} "
                    f"(norm {scale!r}, allowed {bound:g} of it)"
                )


class Forked:
    """A worker that is forked instead of started: what is imported is there at once. For --smoke; its memory is not its own."""

    def __init__(self, main: Callable[[list[str]], object], arguments: Sequence[str]):
        (down, self_in), (self_out, up) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(down, 0), os.dup2(up, 1)
                for one in (down, self_in, self_out, up):
                    os.close(one)
                sys.stdin = open(0, closefd=False)  # noqa: SIM115
                main(list(arguments))
                code = 0
            finally:
                os._exit(code)
        os.close(down), os.close(up)
        self.stdin, self.stdout = os.fdopen(self_in, "w"), os.fdopen(self_out)

    def kill(self) -> None:
        self.stdin.close(), self.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)

    def wait(self) -> int:
        with contextlib.suppress(ChildProcessError):
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


def take_turns(
    module: str,
    forms: dict[str, Sequence[str]],
    rounds: int,
    threads: int,
    fork: Callable[[list[str]], object] | None = None,
    agree: Sequence[tuple[str, str, float]] = (),
) -> dict[str, list[dict]]:
    """Start every form, then run each in turn, `rounds` times, forwards and backwards.

    Args:
        module: what `python -m` runs; forms: name → its arguments, for which it must call `serve`.
        fork: the module's `main`, to fork the workers from this process (--smoke).
        agree: what `compare` compares after the first turn.

    Returns:
        each form's answers, in order.

    Raises:
        Disagree: before anything else is timed.
        RuntimeError: a worker ended.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    answers: dict[str, list[dict]] = {name: [] for name in forms}
    workers = {}
    try:
        for name, arguments in forms.items():
            if fork is not None:
                workers[name] = Forked(fork, arguments)
                continue
            workers[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
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
                    raise RuntimeError(f"{module} {' '.join(forms[name])} ended with {worker.wait()}")
                answers[name].append(json.loads(line))
            if turn == 0:
                compare({name: first[0] for name, first in answers.items()}, agree)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return answers


def serve(run: Callable[[], dict | Sequence]) -> None:
    """The worker's end: run once for every line of standard input, answer with figures, wall time and peak memory.

    run: gives figures by name, or the tensors that it computed: of the first run the answer then has their `digest` as "check",
    made after the clock has stopped.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    for number, _ in enumerate(sys.stdin):
        reset_peak()
        before, cpu, began = memory("VmRSS"), time.process_time(), time.perf_counter()
        result = run()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        peak = memory("VmHWM")
        figures = result if isinstance(result, dict) else {"check": [] if number else digest(*result)}
        del result  # not resident any more when the next run begins
        figures |= {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "peak_bytes": max(peak - before, os.sysconf("SC_PAGE_SIZE")),  # a ratio to nothing says nothing
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
    from kvcat_nemo.common.files import new_file
    from kvcat_nemo.runs.provenance import manifest

    facts |= {"load": [round(x, 2) for x in os.getloadavg()], "seconds": round(time.time() - began, 1)}
    with new_file(out) as file:
        file.write_text(json.dumps({"manifest": manifest(**facts), "rows": rows}, indent=1) + "\n")


def save_figure(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
