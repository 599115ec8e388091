"""Every benchmark's smallest form, `--smoke`: its whole path in seconds, into a temporary folder. Its figures mean nothing.

A published figure can only be made again while its script runs; scripts that nobody runs for months break unseen. CI runs
them all in this form (tests/benchmarks/test_smoke.py).

    python -m benchmarks.smoke                 # all of them, one after another, from one process that imports once
    python -m benchmarks.smoke step loss       # these alone
    python -m benchmarks.step --smoke          # one of them by itself
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
SCRIPTS = (
    "roofline",
    "attention",
    "loss",
    "step",
    "keep_rate",
    "compressors",
    "serving",
    "continuation",
    "attention_matching_authors",
    "parallel_matrix",
)
"""Those that run here. study and faults start NeMo: their own `--smoke` is run where NeMo is imported anyway."""
IMPORTS = (
    "torch",
    "transformers",
    "matplotlib.pyplot",
    "kvcat_nemo.engine.paired_model",
    "kvcat_nemo.compress",
)
"""What costs seconds, once for all of them."""


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="the smallest sizes, once, in seconds, into a temporary folder: shows that it runs; its figures mean nothing",
    )


def shrink(args: argparse.Namespace, parser: argparse.ArgumentParser, **settings) -> argparse.Namespace:
    """With --smoke: these settings instead of the defaults, and files into a temporary folder, never the committed ones."""
    if not args.smoke:
        return args
    folder = Path(tempfile.mkdtemp(prefix="kvcat-smoke-"))
    for name in ("out", "plot"):
        default = parser.get_default(name)
        if default is not None and getattr(args, name) == default:
            setattr(args, name, folder / Path(default).name)
    for name, value in settings.items():
        setattr(args, name, value)
    args.folder = folder
    return args


def tiny_model(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer of bytes, as a Hugging Face folder: the tests' own."""
    from tests.support.hf_models import save_model

    return save_model(
        folder, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2
    )


class Child:
    """`work` in a process of its own that shares what is imported; its output goes to `log`. Used like a Popen.

    new_session: the process leads a session, so that what it starts ends with it.
    """

    def __init__(self, work: Callable[[], object], log: Path, *, new_session: bool = False):
        sys.stdout.flush(), sys.stderr.flush()
        self.returncode: int | None = None
        self._session = new_session
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            if new_session:
                os.setsid()
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            code = int(work() or 0)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG)) != (0, 0):
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            (os.killpg if self._session else os.kill)(self.pid, 9)

    def wait(self, seconds: float | None = None) -> int:
        deadline = None if seconds is None else time.monotonic() + seconds
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                self.kill()
                self.wait()
                return 124
            time.sleep(0.02)
        return self.returncode


def program(module: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Run `python -m module arguments` in this (forked) process."""
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def run(name: str) -> object:
    import torch

    torch.set_num_threads(1)  # a forked process has none of OpenMP's threads
    return importlib.import_module(f"benchmarks.{name}").main(["--smoke"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}; all by default")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write what came of each to this file")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in SCRIPTS:
            parser.error(f"{name}: not known; choose among {', '.join(SCRIPTS)}")
    from kvcat_nemo.engine import hardware

    hardware.enable()
    for name in IMPORTS:
        importlib.import_module(name)
    out = {}
    with tempfile.TemporaryDirectory(prefix="kvcat-smoke-") as place:
        os.environ["TMPDIR"] = tempfile.tempdir = place  # what they write goes with it
        for name in args.names or SCRIPTS:
            began, log = time.monotonic(), Path(place) / f"{name}.log"
            code = Child(lambda name=name: run(name), log, new_session=True).wait(args.timeout)
            seconds, text = round(time.monotonic() - began, 1), log.read_text(errors="replace")
            out[name] = {"code": code, "seconds": seconds, "output": text[-6000:]}
            print(f"{name:30}{'ok' if code == 0 else f'FAILED ({code})':14}{seconds:6.1f} s", flush=True)
            if code:
                print("    " + "\n    ".join(text.splitlines()[-12:]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))
    return int(any(one["code"] for one in out.values()))


if __name__ == "__main__":
    sys.exit(main())
