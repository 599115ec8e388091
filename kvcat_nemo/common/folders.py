"""The one way to write a folder: whole or not at all, and never in the place of what is not ours.

A folder is replaced only when it carries a complete mark of this project (a manifest that lists its files) and holds
nothing else. It is never a source of the work, the working directory or a folder around them, and never a symbolic link.
Old and new change places in one step where the system can; killed at any moment, one of them is whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from kvcat_nemo.common.files import complete_or_absent, flush_file, flush_folder, remove, runs

Ours = Callable[[Path], Collection[str] | None]
"""The paths within a folder that its complete mark lists, the mark itself included; None when it carries none."""


def check_replaceable(
    out: str | os.PathLike, ours: Ours | None = None, *, sources: Iterable[str | os.PathLike] = ()
) -> None:
    """Refuse to write the folder `out` where that would cost something that is not ours. Nothing is changed.

    Args:
        ours: says what of a folder is ours; None: a folder that holds anything is never replaced.
        sources: what the work reads: `out` must not be one of them, nor a folder around one.

    Raises:
        ValueError: naming what would be lost.
    """
    out = Path(os.path.abspath(out))
    if out.is_symlink():
        raise ValueError(f"{out} is a symbolic link to {os.readlink(out)}; name a folder itself")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder")
    real = out.resolve()
    for place, what in [
        (Path.cwd(), "the working directory"),
        (Path(os.path.expanduser("~")), "your home folder"),
    ] + [(Path(source), f"{source}, which is read") for source in sources]:
        place = place.resolve()
        if real == place or real in place.parents:
            raise ValueError(f"{out} {'is' if real == place else 'holds'} {what}; choose another folder")
    if empty(out):
        return
    names = ours(out) if ours is not None else None
    if names is None:
        raise ValueError(
            f"{out} is not replaced: it carries no complete mark of kvcat, so an older version or something else wrote it. "
            "Choose another folder, or move this one away"
        )
    if (foreign := foreign_file(out, names)) is not None:
        raise ValueError(
            f"{out} is not replaced: kvcat did not write {foreign}, which lies in it. Move that file away"
        )


def empty(folder: Path) -> bool:
    """Whether a folder holds nothing at all."""
    return next(folder.iterdir(), None) is None


def foreign_file(folder: Path, names: Collection[str]) -> Path | None:
    """The first file (or link, or anything but a folder) within a folder that is not among `names`."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files) + [f for f in folders if os.path.islink(os.path.join(place, f))]:
            path = Path(place, name)
            if path.is_symlink() or path.relative_to(folder).as_posix() not in names:
                return path
    return None


@contextlib.contextmanager
def new_folder(
    final: str | os.PathLike,
    ours: Ours | None = None,
    *,
    sources: Iterable[str | os.PathLike] = (),
    replace: bool = True,
) -> Iterator[Path]:
    """Yield an empty temporary folder beside `final` that becomes `final`, on disk, when the block succeeds.

    Args:
        ours, sources: as `check_replaceable`, which is asked before the block and before a folder is replaced.
        replace: False: a folder that appeared during the block (another process was faster) is not replaced.

    Raises:
        ValueError: as `check_replaceable`.
    """
    final, sources = Path(os.path.abspath(final)), list(sources)
    recover(final, ours)
    check_replaceable(final, ours, sources=sources)
    with complete_or_absent(final) as temporary:
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        if not replace and final.is_dir() and not empty(final):
            raise ValueError(f"{final} appeared meanwhile; it is left as it is, and this result is not kept")
        check_replaceable(final, ours, sources=sources)
        _put(temporary, final, ours)


def _flush(folder: Path) -> None:
    # The rename must not reach the disk before the data does.
    for place, _, files in os.walk(folder):
        for name in files:
            if not os.path.islink(path := os.path.join(place, name)):
                flush_file(Path(path))
        flush_folder(Path(place))


def _put(temporary: Path, final: Path, ours: Ours | None) -> None:
    if not final.exists() or empty(final):
        os.rename(temporary, final)
        flush_folder(final.parent)
        return
    if _exchange(temporary, final):
        old = temporary
        flush_folder(final.parent)
    else:
        old = temporary.with_name(temporary.name.replace(".partial-", ".replaced-", 1))
        os.rename(final, old)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(old, final)
            raise
        flush_folder(final.parent)
    # A file may have come into it since it was looked at.
    names = ours(old) if ours is not None else None
    if names is None or foreign_file(old, names) is not None:
        kept = final.with_name(f"{final.name}.replaced-{os.getpid()}")
        os.rename(old, kept)
        print(
            f"note: somebody wrote files into the old {final} during the work; the old folder is kept as {kept}",
            file=sys.stderr,
        )
    else:
        shutil.rmtree(old, ignore_errors=True)


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


def _exchange(left: Path, right: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE) == 0


def recover(final: Path, ours: Ours | None) -> None:
    """End a replacement that was killed between its two renames (where `_exchange` cannot be had)."""
    prefix = f".{final.name}.replaced-{socket.gethostname()}-"
    for old in sorted(final.parent.glob(".*.replaced-*")) if final.parent.is_dir() else ():
        pid = old.name.removeprefix(prefix)
        if pid == old.name or not pid.isdigit() or runs(int(pid)):
            continue
        new = old.with_name(old.name.replace(".replaced-", ".partial-", 1))
        if not final.exists():
            finished = ours is not None and new.is_dir() and ours(new) is not None
            os.rename(new if finished else old, final)
            print(
                f"note: {final}: a replacement was interrupted; its {'new' if finished else 'old'} state is back"
            )
        if old.exists():
            remove(old)
