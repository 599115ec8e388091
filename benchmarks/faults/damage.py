"""Full disks, damaged checkpoints, broken data files."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.faults.runs import (
    SAVE_EVERY,
    Record,
    checkpoints,
    difference,
    last_step,
    left_behind,
    newest,
    settings,
    trajectory,
    until,
)
from benchmarks.faults.server import Server
from kvcat_nemo.runs.checkpoints import complete
from kvcat_nemo.runs.layout import BROKEN, MANIFEST, WEIGHTS


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A file system of its own with so much room (tmpfs: its ENOSPC is the kernel's)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disk_full(server: Server, folder: Path, unbroken: list[dict], steps: int, checkpoint_mb: float) -> Record:
    """No room in the middle of the first save, no room before a later one; room again; and the policy `stop`."""
    record = Record()
    # The writing itself meets the end of the disk: there is no earlier checkpoint whose size could warn.
    with small_disk(folder / "first", 0.6 * checkpoint_mb) as disk:
        run = server.run(
            disk, settings(steps) | {"log.ckpt.max_failed_saves": 1}, environment={"TMPDIR": "/tmp"}
        )
        codes = run.wait(300)
        out = run.output()
        record.judge(
            "in the middle of the first save",
            [
                "" if codes != [0] else "it ended as if all were well",
                ""
                if "FAILED" in out and "no space left on the device" in out
                else f"the message does not say so: {out[-1500:]}",
                "" if not complete(checkpoints(disk)) else "a checkpoint counts as complete",
                left_behind(run),
            ],
        )
    # A later save finds no room; training goes on; then there is room again.
    with small_disk(folder / "later", 3.5 * checkpoint_mb + 2) as disk:
        run = server.run(disk, settings(steps) | {"log.ckpt.max_failed_saves": 50})
        until(lambda: not run.running or newest(disk) >= SAVE_EVERY, 240)
        filler = disk / "filler"
        _fill(filler, leave_mb=0.3 * checkpoint_mb, disk=disk)
        was = newest(disk)
        until(lambda: not run.running or last_step(disk) >= was + SAVE_EVERY + 1, 240)
        kept = newest(disk)
        said = "FAILED" in run.output() and "Training goes on" in run.output()
        filler.unlink()
        codes = run.wait(300)
        record.judge(
            "before a later save, then room again",
            [
                "" if kept >= was else f"newest complete checkpoint fell from step {was} to {kept}",
                "" if said else "not said aloud",
                "" if codes == [0] else f"exit codes {codes}: {run.tail(1500)}",
                ""
                if newest(disk) == steps
                else f"newest checkpoint after room was made: step {newest(disk)}",
                _but_for_failed_saves(trajectory(disk), unbroken),
            ],
        )
    with small_disk(folder / "stop", 3.5 * checkpoint_mb + 2) as disk:
        run = server.run(disk, settings(steps) | {"log.ckpt.on_failed_save": "stop"})
        until(lambda: not run.running or newest(disk) >= SAVE_EVERY, 240)
        filler = disk / "filler"
        _fill(filler, leave_mb=0.3 * checkpoint_mb, disk=disk)
        was = newest(disk)
        codes = run.wait(300)
        filler.unlink()
        record.steps_lost.append(last_step(disk) - newest(disk))
        record.judge(
            "with log.ckpt.on_failed_save=stop",
            [
                "" if codes == [1] else f"exit codes {codes}",
                "" if "Training ends" in run.output() else "not said aloud",
                ""
                if newest(disk) >= was
                else f"newest complete checkpoint fell from step {was} to {newest(disk)}",
                _but_for_failed_saves_after(server, disk, steps, unbroken),
            ],
        )
    return record


def _but_for_failed_saves(mine: list[dict], other: list[dict]) -> str:
    return difference([{k: v for k, v in x.items() if k != "failed_saves"} for x in mine], other)


def _but_for_failed_saves_after(server: Server, place: Path, steps: int, unbroken: list[dict]) -> str:
    run = server.run(place, settings(steps))
    codes = run.wait(300)
    return (
        f"exit codes {codes}: {run.tail(800)}"
        if any(codes)
        else _but_for_failed_saves(trajectory(place), unbroken)
    )


def _fill(path: Path, leave_mb: float, disk: Path) -> None:
    free = shutil.disk_usage(disk).free
    with path.open("wb") as file:
        file.write(b"\0" * max(0, free - int(leave_mb * 1e6)))


def damaged_files(server: Server, folder: Path, unbroken: list[dict], steps: int) -> Record:
    """A truncated and a bit-flipped shard: found by size and by hash, with the file's name; the one before is taken."""
    record = Record()
    start = folder / "start"
    run = server.run(start, settings(2 * SAVE_EVERY) | {"log.ckpt.keep_last": 2})
    assert not any(run.wait(300)), run.tail()
    for how in ("truncated", "flipped", "flipped, the only one", "manifest gone"):
        place = folder / how.replace(" ", "-").replace(",", "")
        shutil.copytree(start, place, symlinks=True)
        newer, older = (f.path for f in complete(checkpoints(place))[:2])
        victim = max((newer / WEIGHTS).glob("*.distcp"), key=lambda p: p.stat().st_size)
        if how == "truncated":
            os.truncate(victim, victim.stat().st_size - 100)
        elif how == "manifest gone":
            (newer / MANIFEST).unlink()
        else:
            with victim.open("r+b") as file:
                file.seek(victim.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 4]))
        if how.endswith("only one"):
            shutil.rmtree(older)
            run = server.run(place, settings(steps))
            codes = run.wait(240)
            problems = [
                "" if codes == [1] else f"exit codes {codes}",
                ""
                if str(victim.name) in run.output()
                else f"{victim.name} is not named: {run.output()[-1500:]}",
            ]
            problems.append("" if last_step(place) == 2 * SAVE_EVERY else "it trained")
        else:
            run = server.run(place, settings(steps))
            codes = run.wait(300)
            name = newer.name if how == "manifest gone" else victim.name
            problems = [
                "" if codes == [0] else f"exit codes {codes}: {run.tail(1500)}",
                "" if name in run.output() else f"{name} is not named: {run.output()[-1500:]}",
                ""
                if how == "manifest gone"
                or how == "truncated"
                or any(p.name.endswith(BROKEN) for p in checkpoints(place).iterdir())
                else "not set aside",
                difference(trajectory(place), unbroken),
            ]
            record.steps_lost.append(SAVE_EVERY)
        record.judge(how, problems)
    return record


def _dataset(folder: Path, name: str, documents: int = 3, tokens: int = 5) -> Path:
    """A whole indexed dataset; a document's tokens count upwards from 0."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
    for i in range(documents):
        builder.add_item(torch.arange(tokens + i))
        builder.end_document()
    builder.finalize(str(folder / f"{name}.idx"))
    return folder / name


def bad_files(folder: Path) -> Record:
    """Broken data files are named before anything is started."""
    from kvcat_nemo.data.indexed_check import check_indexed

    record = Record()
    folder.mkdir(parents=True)

    def spoil(name: str, act: Callable[[Path], None], file: str, words: str) -> None:
        prefix = _dataset(folder, name.replace(" ", "-"))
        act(prefix)
        try:
            check_indexed(prefix)
        except ValueError as error:
            good = file in str(error) and words in str(error)
            record.judge(name, ["" if good else f"the message is {error}"])
        else:
            record.judge(name, ["not noticed"])

    def cut(ending: str, by: int) -> Callable[[Path], None]:
        return lambda prefix: os.truncate(f"{prefix}{ending}", os.path.getsize(f"{prefix}{ending}") - by)

    spoil("bin missing", lambda p: os.remove(f"{p}.bin"), ".bin", "does not exist")
    spoil("bin empty", lambda p: os.truncate(f"{p}.bin", 0), ".bin", "is empty")
    spoil("idx empty", lambda p: os.truncate(f"{p}.idx", 0), ".idx", "is empty")
    spoil("bin truncated", cut(".bin", 4), ".bin", "truncated")
    spoil("idx truncated", cut(".idx", 8), ".idx", "truncated")
    spoil("not an index", lambda p: Path(f"{p}.idx").write_bytes(b"x" * 200), ".idx", "no Megatron index")
    spoil(
        "of another dataset",
        lambda p: shutil.copy(f"{_dataset(folder, 'other', 7)}.idx", f"{p}.idx"),
        ".bin",
        "its index promises",
    )

    def flip(prefix: Path) -> None:
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(9 + 8 + 1 + 16)
            file.write(b"\x07")

    spoil("index damaged", flip, ".idx", "damaged")
    whole = check_indexed(_dataset(folder, "whole"))
    record.judge("whole", ["" if (whole.documents, whole.tokens) == (3, 18) else f"{whole}"])
    return record


def bad_data(server: Server, folder: Path) -> Record:
    """Broken data files (`bad_files`) end a run before its first step, and so does a token that the model does not have."""
    record = bad_files(folder)

    def run(name: str, prefix: Path, words: str) -> None:
        job = server.run(folder / name.replace(" ", "-"), settings(4), data=prefix)
        codes = job.wait(240)
        record.judge(
            name,
            [
                "" if codes == [1] else f"exit codes {codes}",
                "" if words in job.output() else f"{words!r} is not said: {job.tail(1500)}",
                "" if last_step(folder / name.replace(" ", "-")) == 0 else "it trained",
                left_behind(job),
            ],
        )

    short = _dataset(folder, "short", 40, 100)
    os.truncate(f"{short}.bin", os.path.getsize(f"{short}.bin") - 4)
    run("a run on a truncated file", short, "short.bin")
    # kvcat_tiny has 128 tokens.
    run(
        "a run on a token that the model does not have",
        _dataset(folder, "other-tokens", 40, 200),
        "the model's vocabulary has 128",
    )
    return record
