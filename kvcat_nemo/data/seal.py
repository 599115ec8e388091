"""The seal of a checkpoint: size and hash of every file, written when all of them are on disk.

A checkpoint without a seal is incomplete, whatever its folder looks like. One whose files differ from their seal is
damaged. Plain files and hashes: no torch, so that tools can look at a checkpoint in no time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.data.files import new_file

SEAL = "kvcat_seal.json"
SCORE = "kvcat_score.json"
BROKEN = "-broken"
"""Ending of a damaged checkpoint's folder that was set aside."""
UNFINISHED = "-unfinished"
"""Ending of the file beside a checkpoint's folder while it is written or removed (NeMo's name for it)."""
_NOT_SEALED = (SEAL, SCORE)
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp$")


class Incomplete(ValueError):
    """A checkpoint that was never sealed."""


class Damaged(ValueError):
    """A sealed checkpoint whose files are not what the seal says."""


@dataclass(frozen=True)
class Seal:
    """What kvcat_seal.json holds."""

    step: int
    """Optimizer steps done."""
    files: dict[str, dict]
    """Path within the folder → {"bytes", "sha256"}."""
    facts: dict
    """More about the save: world_size, layout, seconds."""

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())


def contents(folder: Path) -> list[str]:
    """Paths within a checkpoint that belong under its seal, sorted."""
    found = (p for p in folder.rglob("*") if p.is_file())
    names = (p.relative_to(folder).as_posix() for p in found)
    return sorted(n for n in names if n not in _NOT_SEALED and ".partial-" not in n)


def owner(name: str, world_size: int) -> int:
    """The rank that wrote a file of a distributed checkpoint (all but the tensors' shards are rank 0's)."""
    match = _RANK_FILE.search(name)
    return int(match[1]) % world_size if match else 0


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Flush files to disk and return {name: {"bytes", "sha256"}}."""
    return {name: _entry(folder / name, flush=True) for name in names}


def _entry(path: Path, flush: bool = False) -> dict:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def write_seal(folder: Path, step: int, files: dict[str, dict], **facts) -> None:
    """Declare a checkpoint complete. All its files must be on disk.

    Raises:
        OSError: from the file system; the checkpoint stays incomplete.
        Damaged: when `files` is not what the folder holds.
    """
    if missing := sorted(set(contents(folder)) ^ set(files)):
        raise Damaged(f"{folder / missing[0]}: the files that were hashed and those in the folder differ")
    with new_file(folder / SEAL) as temporary, temporary.open("w", encoding="utf-8") as out:
        json.dump({"step": step, "files": files, "facts": facts}, out, indent=1, sort_keys=True)
        out.flush()
        os.fsync(out.fileno())
    for place in (folder, folder.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_seal(folder: str | Path) -> Seal:
    """The seal of a checkpoint.

    Raises:
        Incomplete: when it has none, or is marked as being written or removed.
        Damaged: when the seal itself cannot be read.
    """
    folder = Path(folder)
    if folder.with_name(folder.name + UNFINISHED).exists():
        raise Incomplete(f"{folder}: its save (or removal) did not end ({UNFINISHED[1:]} marker)")
    path = folder / SEAL
    if not path.is_file():
        raise Incomplete(f"{folder}: its save did not end (no {SEAL})")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Seal(int(stored["step"]), dict(stored["files"]), dict(stored["facts"]))
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: not a seal ({error})") from None


def damage(
    folder: str | Path, seal: Seal, *, part: int = 0, parts: int = 1, hashes: bool = True
) -> list[str]:
    """What is wrong with a sealed checkpoint's files, a line each that begins with the file's path.

    Args:
        part, parts: look at the hashes of every `parts`-th file alone, so that ranks share the work. Sizes are always
            looked at, of all files.
        hashes: False compares sizes alone.
    """
    folder, found = Path(folder), []
    for name, entry in seal.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{path}: {path.stat().st_size:,} bytes, saved with {entry['bytes']:,} (truncated?)")
    if found or not hashes:
        return found
    mine = [name for i, name in enumerate(sorted(seal.files)) if i % parts == part]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name, entry in zip(mine, pool.map(lambda n: _entry(folder / n), mine), strict=True):
            if entry["sha256"] != seal.files[name]["sha256"]:
                found.append(f"{folder / name}: its contents changed since it was saved (sha256 differs)")
    return found


@dataclass(frozen=True)
class Found:
    """One folder below a run's checkpoints/."""

    path: Path
    step: int
    """-1 when it has no seal."""
    why_not: str
    """What is wrong with it; empty when it is complete and its files have the right sizes."""
    damaged: bool = False
    """It was complete once."""


def survey(checkpoints: str | Path) -> list[Found]:
    """All checkpoints of a run, newest first, those that cannot be used last. Hashes are not looked at."""
    found = []
    for folder in Path(checkpoints).glob("*"):
        if not folder.is_dir() or folder.is_symlink() or folder.name.endswith(BROKEN):
            continue
        try:
            seal = read_seal(folder)
            wrong = damage(folder, seal, hashes=False)
            found.append(Found(folder, seal.step, wrong[0] if wrong else "", bool(wrong)))
        except ValueError as error:
            found.append(Found(folder, -1, str(error), isinstance(error, Damaged)))
    return sorted(found, key=lambda f: (not f.why_not, f.step, f.path.name), reverse=True)


def complete(checkpoints: str | Path) -> list[Found]:
    """The complete checkpoints of a run, newest first."""
    return [found for found in survey(checkpoints) if not found.why_not]


def write_score(folder: Path, metric: str, value: float) -> None:
    """Keep a validation figure beside a checkpoint."""
    with new_file(folder / SCORE) as temporary:
        temporary.write_text(json.dumps({"metric": metric, "value": value}) + "\n", encoding="utf-8")


def read_score(folder: Path, metric: str) -> float | None:
    """A checkpoint's validation figure, None when it has none of this name."""
    try:
        stored = json.loads((folder / SCORE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored["value"] if stored.get("metric") == metric else None
