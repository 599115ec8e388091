"""The checkpoints of a run, and which of them a path means."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.runs.checkpoint_manifest import Manifest
from kvcat_nemo.runs.integrity import Bar, Standing, examine, has_manifest
from kvcat_nemo.runs.layout import BROKEN, MANIFEST, UNFINISHED, WEIGHTS

ACCEPT = "--unverified"
"""The option of every command that takes a checkpoint without a manifest."""


def survey(checkpoints: str | Path) -> list[Standing]:
    """All checkpoints of a run, newest first, those that cannot be used last. Hashes are not looked at."""
    found = []
    for folder in Path(checkpoints).glob("*"):
        if not folder.is_symlink() and folder.is_dir() and not folder.name.endswith(BROKEN):
            found.append(examine(folder, hashes=False))
    return sorted(found, key=lambda one: (one.whole, one.step, one.path.name), reverse=True)


def complete(checkpoints: str | Path) -> list[Standing]:
    """The complete checkpoints of a run, newest first."""
    return [one for one in survey(checkpoints) if one.whole]


@dataclass(frozen=True)
class Checkpoint:
    """One distributed checkpoint, and the folder whose manifest lists it."""

    folder: Path
    """What the manifest covers; the same as `weights` for a bare distributed checkpoint."""
    weights: Path
    manifest: Manifest | None
    """None for one that has no manifest, and that was taken by name."""

    def require_whole(self) -> None:
        """Compare every file's hash, with a progress bar where it takes long.

        Raises:
            ValueError: when a file is not what was saved.
        """
        if self.manifest is None:
            return
        with Bar(f"check {self.folder.name}", self.manifest.bytes) as bar:
            standing = examine(self.folder, progress=bar)
        if not standing.whole:
            raise ValueError(standing.why_not)


def find_checkpoint(path: str | Path, *, unverified: bool = False) -> Checkpoint:
    """The checkpoint that `path` means: itself, that of its weights/, or the newest complete one of a run's folder.

    Names and sizes of the files are compared with the manifest; hashes are left to `Checkpoint.require_whole`.

    Args:
        unverified: take one without a manifest: a plain NeMo or Megatron checkpoint, or a folder that an older kvcat
            imported. A manifest that is there must hold all the same.

    Raises:
        ValueError: when there is none, or it is unfinished, damaged, or without a manifest; says what to do.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path} is not a folder")
    path = Path(path).resolve()  # checkpoints/last is a link, `.` has no name and no neighbours
    if _is_weights(path):
        inside = path.name == WEIGHTS and (has_manifest(path.parent) or not has_manifest(path))
        return _take(path.parent if inside else path, path, unverified)
    if _is_weights(path / WEIGHTS) or has_manifest(path):
        return _take(path, path / WEIGHTS, unverified)
    found = [m.parent.parent for m in path.rglob(f"{WEIGHTS}/metadata.json") if _is_weights(m.parent)]
    # Hidden folders are conversions that have not been published.
    found = [f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    return _newest(path, found, unverified)


def _is_weights(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() and (folder / ".metadata").is_file()


def _take(folder: Path, weights: Path, unverified: bool) -> Checkpoint:
    if folder.with_name(folder.name + UNFINISHED).exists():
        raise ValueError(f"{folder} is unfinished: its {UNFINISHED} marker is still beside it")
    if folder.name.endswith(BROKEN):
        raise ValueError(f"{folder} was set aside as damaged ({BROKEN}); take another checkpoint")
    if not has_manifest(folder):
        if not unverified:
            raise ValueError(
                f"{folder} has no {MANIFEST}: its save did not end, or an older kvcat or another program wrote it. Nothing tells "
                f"whether its files are whole. Import it again, take another checkpoint, or, if you trust it, pass {ACCEPT}"
            )
        return Checkpoint(folder, weights, None)
    standing = examine(folder, hashes=False)
    if not standing.whole:
        raise ValueError(standing.why_not)
    if not _is_weights(weights):
        raise ValueError(f"{folder} holds no Megatron distributed checkpoint (weights/metadata.json)")
    return Checkpoint(folder, weights, standing.manifest)


def _newest(run: Path, folders: list[Path], unverified: bool) -> Checkpoint:
    usable = [f for f in folders if not f.name.endswith(BROKEN)]
    listed = sorted(
        (examine(f, hashes=False) for f in usable if has_manifest(f)),
        key=lambda one: (one.step, one.path.name),
        reverse=True,
    )
    whole = [one for one in listed if one.whole]
    # A manifest that cannot be read does not tell its step: it may well be the newest.
    doubtful = [
        one for one in listed if one.damaged and (one.step < 0 or not whole or one.step > whole[0].step)
    ]
    if doubtful:
        other = f"; the newest that is whole is {whole[0].path}: name it to take it" if whole else ""
        raise ValueError(f"{run}: its newest checkpoint is damaged: {doubtful[0].why_not}{other}")
    passed = [f for f in usable if not any(one.path == f for one in whole)]
    if whole:
        _say_passed(whole[0].path, passed)
        return Checkpoint(whole[0].path, whole[0].path / WEIGHTS, whole[0].manifest)
    open_ = [f for f in passed if not has_manifest(f) and not f.with_name(f.name + UNFINISHED).exists()]
    if open_ and unverified:
        newest = max(open_, key=_recency)
        return Checkpoint(newest, newest / WEIGHTS, None)
    if open_:
        return _take(max(open_, key=_recency), run, False)  # raises, and says why
    hint = f"; {len(folders)} unfinished or damaged one(s) were skipped" if folders else ""
    raise ValueError(f"{run} holds no Megatron distributed checkpoint (weights/metadata.json){hint}")


def _say_passed(taken: Path, passed: list[Path]) -> None:
    newer = [f.name for f in passed if _step(f) > _step(taken)]
    if newer:
        print(f"note: passed over {', '.join(sorted(newer))}: not complete", file=sys.stderr)


def _step(checkpoint: Path) -> int:
    found = re.search(r"step=(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def _recency(checkpoint: Path) -> tuple[int, int, float]:
    """NeMo writes step and consumed samples into the name; "…-last" has the same ones, so time breaks the tie."""
    samples = re.search(r"consumed_samples=(\d+)", checkpoint.name)
    changed = (checkpoint / WEIGHTS / ".metadata").stat().st_mtime
    return _step(checkpoint), int(samples[1]) if samples else -1, changed
