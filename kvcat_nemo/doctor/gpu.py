"""`kvcat train doctor --gpu`: which parts there are, whether they can run here, and each in a process of its own.

A process of its own, because an illegal address on a GPU takes its process along, and a hang can be ended.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcat_nemo.common.processes import die_with_parent
from kvcat_nemo.doctor.report import FAILED, SKIPPED, Check, PartResult, run_part


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    name: str
    minutes: float
    """How long it is expected to take on a GPU host; computed from its steps, not measured. It is ended after four times that."""
    text: str
    gpus: int = 1


PARTS = (
    Part("kernels", 1.0, "attention kernels with gates against float64, each that is installed"),
    Part("losses", 0.2, "CE and KL from hidden states in bf16 against float64, with gradients"),
    Part(
        "megatron",
        0.8,
        "ten steps on plain Megatron-core, D 64 tied and D 128 untied, against the CPU in float32",
    ),
    Part("nemo", 3.0, "the same through nemo llm pretrain, with all GPU features of the recipes"),
    Part("converted", 0.8, "a converted model under training's layers: perplexity against transformers"),
    Part("resume", 1.8, "asynchronous save, SIGKILL, resume: every figure bit for bit"),
    Part("step", 0.7, "launches and syncs per layer, paired over plain step, peak memory against the plan"),
    Part("parallel", 1.0, "TP2 with SP, PP2, CP2 and DP2 against one process", gpus=2),
    Part("reshard", 0.3, "a checkpoint of one process goes on at TP2", gpus=2),
)
NAMES = tuple(part.name for part in PARTS)


def chosen(names: str | None) -> list[Part]:
    """The parts of a comma-separated list; None: all.

    Raises:
        ValueError: for a name that is none.
    """
    if names is None:
        return list(PARTS)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in NAMES:
            raise ValueError(f"--parts {names}: no part {name!r}; choose from {', '.join(NAMES)}")
    if not wanted:
        raise ValueError(f"--parts {names!r}: name at least one of {', '.join(NAMES)}")
    return [part for part in PARTS if part.name in wanted]


def is_expected(part: Part, device: str) -> bool:
    """Whether a machine of this many GPUs is expected to run a part: of one GPU not those for two, of none all."""
    import torch

    found = torch.cuda.device_count() if device == "cuda" and torch.cuda.is_available() else 0
    return not found or part.gpus <= found


def why_not(part: Part, device: str) -> str | None:
    """Why a part cannot run here, or None. What packages it lacks it says itself."""
    import torch

    if device == "cpu":
        return None
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not found:
        built = torch.version.cuda
        return "no CUDA device" + ("" if built else " (torch is a CPU build)")
    if found < part.gpus:
        return f"it needs {part.gpus} GPUs, this machine has {found}"
    return None


def machine() -> dict[str, Any]:
    """What the report says of the machine: devices and versions."""
    import torch

    versions = {}
    for name in ("torch", "transformer-engine", "flash-attn", "flash-attn-3", "apex", "megatron-core", "nemo-toolkit",
                 "transformers", "kvcat-nemo"):  # fmt: skip
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": found.name,
                    "capability": f"{found.major}.{found.minor}",
                    "bytes": found.total_memory,
                }
            )
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "devices": devices,
        "versions": versions,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def run_parts(
    parts: list[Part],
    folder: Path,
    *,
    device: str = "cuda",
    model: Path | None = None,
    say: Callable[[str], None] = print,
    timeout_factor: float = 4.0,
) -> Iterator[PartResult]:
    """Each part's result as soon as it is known; `say` gets a line for every check."""
    for number, part in enumerate(parts, 1):
        head = f"[{number}/{len(parts)}] {part.name}"
        reason = why_not(part, device)
        if reason is not None:
            checks = [Check(part.name, SKIPPED, reason)]
            yield PartResult(part.name, SKIPPED, reason, 0.0, checks, is_expected(part, device))
            continue
        say(f"{head}: {part.text} (about {part.minutes:g} min)")
        yield _in_a_process(part, folder, device, model, say, 60 * part.minutes * timeout_factor + 60)


def _in_a_process(
    part: Part, folder: Path, device: str, model: Path | None, say: Callable[[str], None], seconds: float
) -> PartResult:
    result, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "kvcat_nemo.doctor.gpu",
        part.name,
        device,
        str(folder),
        str(model or ""),
    ]
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        _forward(process, say, began + seconds)
    finally:
        ended = process.poll()
        if ended is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.monotonic() - began
    if ended == 0 and result.is_file():
        found = json.loads(result.read_text())
        return PartResult(**found | {"checks": [Check(**check) for check in found["checks"]]})
    what = f"did not end in {seconds:.0f} s" if ended is None else f"its process ended with {ended}"
    last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-8:])
    text = f"{what}; {log} ends:\n{last}" if last else what
    return PartResult(part.name, FAILED, text, took, [Check(part.name, FAILED, text, took)])


def _forward(process: subprocess.Popen, say: Callable[[str], None], deadline: float) -> None:
    """Hand on the lines that a part prints, until it ends or the time is up."""
    import threading

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is not None:
        reader.join(10)


def main(name: str, device: str, folder: str, model: str) -> None:
    """One part, in this process; its result goes to FOLDER/NAME.json."""
    from kvcat_nemo.doctor import parts

    host = parts.Host(device, Path(folder), Path(model) if model else None)
    function = parts.CHECKS[name]

    def told(*arguments) -> Iterator[Check]:
        for check in function(*arguments):
            note = f": {check.text.splitlines()[0]}" if check.text else ""
            print(f"    {check.status:<8}{check.seconds:6.1f} s  {check.name}{note}", flush=True)
            yield check

    result = run_part(name, told, host)
    (host.folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(result), default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
