"""A folder's manifest, kvcat_seal.json: size and hash of every file, written when all of them are on disk.

Checkpoints of runs, imported base models and exported models carry one. Plain files and hashes, no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kvcat_nemo.common.files import flush_folder, new_file
from kvcat_nemo.runs.layout import MANIFEST, SCORE, UNFINISHED

FORMAT = 2
"""1, without "format" and "sha256", is what runs wrote before."""

_NOT_LISTED = (MANIFEST, SCORE)
# What file systems and desktops leave in any folder; no reader looks at it.
_STRAY = re.compile(r"(^|/)(\.nfs[^/]*|\.DS_Store|\._[^/]*|Thumbs\.db)$")
_RANK_FILE = re.compile(r"__(\d+)_\d+\.distcp$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PIECE = 4 << 20


class Incomplete(ValueError):
    """A folder that never had a manifest, or is being written or removed."""


class Damaged(ValueError):
    """A folder whose files are not what its manifest says."""


@dataclass(frozen=True)
class Manifest:
    """What kvcat_seal.json holds."""

    step: int
    """Optimizer steps done; 0 for a model that was imported or exported."""
    files: dict[str, dict]
    """Path within the folder → {"bytes", "sha256"}."""
    facts: dict
    """More about the save: world_size, seconds, vocab_size, padded_vocab_size; kind, where it is no run's checkpoint."""

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())


def contents(folder: Path) -> list[str]:
    """Paths within a folder that its manifest lists, sorted: everything but folders, symbolic links included."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(n for n in found if n not in _NOT_LISTED and ".partial-" not in n and not _STRAY.search(n))


def owner(name: str, world_size: int) -> int:
    """The rank that wrote a file of a distributed checkpoint (all but the tensors' shards are rank 0's)."""
    match = _RANK_FILE.search(name)
    return int(match[1]) % world_size if match else 0


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Flush files to disk and return {name: {"bytes", "sha256"}}; several are read at a time."""
    names = list(names)
    return dict(zip(names, _entries(folder, names, flush=True), strict=True))


def hashes_of(folder: Path, names: list[str], progress: Callable[[int], Any] | None = None) -> list[str]:
    """The files' sha256; `progress` is called with the number of bytes that were read since its last call."""
    return [entry["sha256"] for entry in _entries(folder, names, progress=progress)]


def _entries(folder: Path, names: list[str], **options) -> Iterable[dict]:
    # Hashing lets other threads run; more than eight read no faster from one file system.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda name: _entry(folder / name, **options), names)


def _entry(path: Path, flush: bool = False, progress: Callable[[int], Any] | None = None) -> dict:
    digest, size = hashlib.sha256(), 0
    # A link is never followed: what it points to is no part of the folder.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        if flush:
            os.fsync(file.fileno())
        buffer = memoryview(bytearray(_PIECE))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            if progress is not None:
                progress(count)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_manifest(folder: Path, step: int, files: dict[str, dict], **facts) -> None:
    """Declare a folder complete. All its files must be on disk.

    Raises:
        OSError: from the file system; the folder stays incomplete.
        Damaged: when `files` is not what the folder holds.
    """
    if missing := sorted(set(contents(folder)) ^ set(files)):
        raise Damaged(f"{folder / missing[0]}: the files that were hashed and those in the folder differ")
    body = {"format": FORMAT, "step": step, "files": files, "facts": facts}
    with new_file(folder / MANIFEST) as temporary, temporary.open("w", encoding="utf-8") as out:
        json.dump(body | {"sha256": _digest(body)}, out, indent=1, sort_keys=True)
        out.write("\n")
    for place in (folder, folder.parent):
        flush_folder(place)


def hash_and_write_manifest(folder: Path, step: int = 0, **facts) -> None:
    """Hash every file of a folder that one process wrote, and write its manifest."""
    write_manifest(folder, step, hash_files(folder, contents(folder)), **facts)


def _digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        Incomplete: when it has none, or is marked as being written or removed.
        Damaged: when the manifest itself cannot be read, or is not what was written.
    """
    folder = Path(folder)
    if folder.with_name(folder.name + UNFINISHED).exists():
        raise Incomplete(f"{folder}: its save (or removal) did not end ({UNFINISHED[1:]} marker)")
    path = folder / MANIFEST
    if not path.is_file():
        raise Incomplete(f"{folder}: its save did not end (no {MANIFEST})")
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path}: not a manifest ({error})") from None


def listed_names(folder: Path, kinds: Collection[str] = ()) -> set[str] | None:
    """What of a folder this project wrote: the files that its manifest lists. None when it has no manifest, or one that cannot be read.

    (Their contents are not looked at: a damaged folder is replaced, too.)

    Args:
        kinds: what the manifest may be of (its fact "kind"); any kind when there are none.
    """
    try:
        found = read_manifest(folder)
    except ValueError:
        return None
    if kinds and found.facts.get("kind") not in kinds:
        return None
    return {MANIFEST, SCORE, *found.files}


def _parse(stored: dict) -> Manifest:
    body = {name: stored[name] for name in ("format", "step", "files", "facts") if name in stored}
    if not stored.keys() <= {"step", "files", "facts"}:  # what runs wrote before
        if stored.get("format") != FORMAT:
            raise ValueError(f"format {stored.get('format')!r}, this version reads {FORMAT}")
        if stored.get("sha256") != _digest(body):
            raise ValueError("its own sha256 differs: it changed since it was written")
    found = Manifest(body["step"], body["files"], body["facts"])
    if type(found.step) is not int or not isinstance(found.facts, dict) or not found.files:
        raise ValueError("step, files or facts are not what a manifest holds")
    for name, entry in found.files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or place.as_posix() != name or name in _NOT_LISTED:
            raise ValueError(f"it names {name!r}, which is no file of the folder")
        if type(entry["bytes"]) is not int or not _SHA256.fullmatch(entry["sha256"]):
            raise ValueError(f"{name}: no size and hash")
    return found
