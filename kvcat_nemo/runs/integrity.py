"""Is a folder complete, and is it what its manifest says? Every reader of a checkpoint asks here, and nowhere else.

Readers: a run's resume and start from a base (kvcat_nemo.nemo), export, verify and whatever else converts, `kvcat train
doctor`, `kvcat train watch`, the launch scripts, and what decides which checkpoints stay.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvcat_nemo.runs.checkpoint_manifest import (
    Damaged,
    Incomplete,
    Manifest,
    contents,
    hashes_of,
    read_manifest,
)
from kvcat_nemo.runs.layout import BASE, BROKEN, MANIFEST

_SHOWN = 3


@dataclass(frozen=True)
class Standing:
    """What was found about one folder."""

    path: Path
    state: Literal["whole", "incomplete", "damaged"]
    """incomplete: it never had a manifest, or is marked as being written; damaged: it was complete once."""
    manifest: Manifest | None
    lines: tuple[str, ...] = ()
    """What is wrong, each beginning with the path that is meant."""

    @property
    def whole(self) -> bool:
        return self.state == "whole"

    @property
    def damaged(self) -> bool:
        return self.state == "damaged"

    @property
    def step(self) -> int:
        """Optimizer steps done; -1 without a readable manifest."""
        return -1 if self.manifest is None else self.manifest.step

    @property
    def why_not(self) -> str:
        """What is wrong in one line; empty when it is whole."""
        more = f"; and {len(self.lines) - _SHOWN} more" if len(self.lines) > _SHOWN else ""
        return "; ".join(self.lines[:_SHOWN]) + more


def examine(
    folder: str | Path,
    *,
    hashes: bool = True,
    part: int = 0,
    parts: int = 1,
    only: Callable[[str], bool] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Standing:
    """Compare a folder with its manifest: no file is missing, added, a link, of another size, or of other contents.

    Args:
        hashes: False compares names and sizes alone, in no time.
        part, parts: hash every `parts`-th file alone, so that ranks share the work. Names and sizes are always compared.
        only: hash the files alone for whose names it says True.
        progress: called with numbers of bytes, as they are hashed.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except Incomplete as error:
        return Standing(folder, "incomplete", None, (str(error),))
    except Damaged as error:
        return Standing(folder, "damaged", None, (str(error),))
    found = [f"{folder}: it was set aside as damaged ({BROKEN})"] if folder.name.endswith(BROKEN) else []
    found += _misfits(folder, manifest)
    if hashes and not found:
        names = [name for i, name in enumerate(sorted(manifest.files)) if i % parts == part]
        names = [name for name in names if only is None or only(name)]
        try:
            for name, digest in zip(names, hashes_of(folder, names, progress), strict=True):
                if digest != manifest.files[name]["sha256"]:
                    found.append(f"{folder / name}: its contents changed since it was saved (sha256 differs)")
        except OSError as error:  # a disk that cannot be read is a damaged checkpoint, too
            found.append(f"{error.filename or folder}: {error.strerror or error}")
    return Standing(folder, "damaged" if found else "whole", manifest, tuple(found))


def _misfits(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are missing, of another kind or size, or not listed."""
    found = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            known = path.lstat()
        except OSError:
            found.append(f"{path}: missing")
            continue
        if not stat.S_ISREG(known.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(known.st_mode) else "no plain file"
            found.append(f"{path}: {kind}, where a plain file was saved")
        elif known.st_size != entry["bytes"]:
            found.append(f"{path}: {known.st_size:,} bytes, saved with {entry['bytes']:,} (truncated?)")
    for name in contents(folder):
        if name not in manifest.files and name.rsplit("/", 1)[-1] != BASE:
            found.append(f"{folder / name}: not part of what was saved; move it out of the folder")
    return found


def require_whole(folder: str | Path, **options) -> Manifest:
    """The manifest of a folder that is complete and whole.

    Args:
        options: as `examine`.

    Raises:
        ValueError: when it is not; names every file.
    """
    standing = examine(folder, **options)
    if standing.manifest is None or not standing.whole:
        raise ValueError(standing.why_not)
    return standing.manifest


def has_manifest(folder: str | Path) -> bool:
    """Whether there is a manifest at all, readable or not."""
    return (Path(folder) / MANIFEST).is_file()


def require_unchanged(model: str | Path) -> None:
    """Of a Hugging Face folder that kvcat exported, and that so has a manifest, every file must be what was written. Others pass.

    Raises:
        ValueError: naming the file, and what to do for a change of one's own.
    """
    if has_manifest(model):
        standing = examine(model)
        if not standing.whole:
            raise ValueError(
                f"{standing.why_not}. Export it again, or, if you changed it yourself, remove {Path(model) / MANIFEST}"
            )


class Bar:
    """A progress bar of hashed bytes on a terminal's stderr; nothing where there is no terminal or little to read."""

    def __init__(self, what: str, total: int):
        self._bar = None
        if total > 200_000_000 and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True)

    def __call__(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()
