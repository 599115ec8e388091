"""Which checkpoints of a run stay: the newest, and the best by a validation figure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from kvcat_nemo.common.files import new_file
from kvcat_nemo.runs.checkpoint_manifest import contents
from kvcat_nemo.runs.checkpoints import complete
from kvcat_nemo.runs.integrity import Standing
from kvcat_nemo.runs.layout import (
    BASE,
    BROKEN,
    CONTEXT,
    HASHES,
    LAST,
    MANIFEST,
    RECORD,
    SCORE,
    UNFINISHED,
    WEIGHTS,
    read_record,
)


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


def best_of(found: Sequence[Standing], metrics: Sequence[str]) -> Path | None:
    """The checkpoint with the lowest figure, the later one of equals; None when none has a figure."""
    scored = []
    for one in found:
        value = next((v for name in metrics if (v := read_score(one.path, name)) is not None), None)
        if value is not None:
            scored.append((value, -one.step, one.path))
    return min(scored)[2] if scored else None


def remove(path: Path) -> None:
    """Remove a checkpoint, complete or not. It stops counting before its first file goes, whatever ends the removal.

    One that holds files which no save writes is set aside (…-broken) instead: they are somebody's.
    """
    if path.is_symlink():
        path.unlink()
        return
    (path / MANIFEST).unlink(missing_ok=True)
    if path.is_dir() and any(not _saved(name) for name in contents(path)):
        set_aside(path)
    else:
        shutil.rmtree(path, ignore_errors=True)
    if not path.exists():
        path.with_name(path.name + UNFINISHED).unlink(missing_ok=True)


def _saved(name: str) -> bool:
    # What NeMo and this project write into a checkpoint.
    return name.startswith((f"{WEIGHTS}/", f"{CONTEXT}/", HASHES)) or name in (BASE, RECORD)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint to …-broken, where no reader takes it for one."""
    target, number = path.with_name(path.name + BROKEN), 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}-{number}{BROKEN}")
    path.rename(target)
    return target


def write_score(folder: Path, metric: str, value: float) -> None:
    """Keep a validation figure beside a checkpoint."""
    with new_file(folder / SCORE) as temporary:
        temporary.write_text(json.dumps({"metric": metric, "value": value}) + "\n", encoding="utf-8")


def read_score(folder: Path, metric: str) -> float | None:
    """A checkpoint's validation figure, None when it has none of this name."""
    try:
        stored = read_record(folder / SCORE)
    except (OSError, ValueError):
        return None
    value = stored.get("value") if stored.get("metric") == metric else None
    return value if isinstance(value, int | float) else None


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    os.replace(temporary, link)
