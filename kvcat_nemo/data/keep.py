"""Which checkpoints of a run stay: the newest, and the best by a validation figure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvcat_nemo.data.seal import SEAL, UNFINISHED, Found, complete, read_score, write_score

LAST = "last"
"""Symbolic link to the newest complete checkpoint."""


def tidy(
    folder: Path,
    scores: dict[int, tuple[str, float]],
    *,
    keep_last: int,
    keep_best: bool,
    metrics: Sequence[str],
) -> None:
    """Point at the newest, write down scores, remove what is neither among the newest nor the best. One process calls it.

    Args:
        scores: step → (figure's name, value) of validations whose checkpoint may be complete by now; those that are
            written down are taken out.
        metrics: names of figures that count, the preferred one first; lower is better.

    Raises:
        OSError: from the file system; nothing that is to stay is touched.
    """
    found = complete(folder)
    for one in found:
        if one.step in scores:
            write_score(one.path, *scores.pop(one.step))
    if found:
        _point(folder / LAST, found[0].path)
    keep = {one.path for one in found[:keep_last]}
    if keep_best and (best := best_of(found, metrics)) is not None:
        keep.add(best)
    for one in found:
        if one.path not in keep:
            remove(one.path)


def best_of(found: Sequence[Found], metrics: Sequence[str]) -> Path | None:
    """The checkpoint with the lowest figure, the later one of equals; None when none has a figure."""
    scored = []
    for one in found:
        value = next((v for name in metrics if (v := read_score(one.path, name)) is not None), None)
        if value is not None:
            scored.append((value, -one.step, one.path))
    return min(scored)[2] if scored else None


def remove(path: Path) -> None:
    """Remove a checkpoint, complete or not. It stops counting before its first file goes, whatever ends the removal."""
    (path / SEAL).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    if not path.exists():
        path.with_name(path.name + UNFINISHED).unlink(missing_ok=True)


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)
