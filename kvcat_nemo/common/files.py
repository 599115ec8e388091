"""Files that are either complete or not there: written under a temporary name, then renamed. (Folders: common.folders.)"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def sha256_of(path: str | os.PathLike) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_jsonl_target(path: Path, ours: Callable[[Any], bool]) -> None:
    """Refuse to write over a file that is not what we would write: its first line tells.

    Args:
        ours: whether a JSON value may be of ours.

    Raises:
        ValueError: naming the file.
    """
    if not os.path.lexists(path):
        return
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("it is no plain file")
        with path.open("rb") as file:
            known = ours(json.loads(file.readline(1 << 26)))
    except (OSError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"{path} exists and is not what would be written there; it is not replaced: give another file"
        )


def flush_file(path: Path) -> None:
    """Have a file's contents on disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Have a folder's names on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial-{socket.gethostname()}-{os.getpid()}")


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(final: Path) -> None:
    """Remove what killed processes of this host left behind; another host's may still be at work."""
    prefix = f".{final.name}.partial-{socket.gethostname()}-"
    for leftover in final.parent.glob(".*.partial-*"):
        pid = leftover.name.removeprefix(prefix)
        if pid != leftover.name and pid.isdigit() and (int(pid) == os.getpid() or not runs(int(pid))):
            remove(leftover)


@contextlib.contextmanager
def complete_or_absent(final: Path) -> Iterator[Path]:
    """Yield a temporary path beside `final`, and remove what lies there when the block fails."""
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final)
    temporary = temporary_name(final)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise


@contextlib.contextmanager
def new_file(final: str | os.PathLike, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `final`; what was written there becomes `final` when the block succeeds.

    replace=False: a `final` that another process has made meanwhile stays.
    """
    final = Path(final)
    with complete_or_absent(final) as temporary:
        yield temporary
        flush_file(temporary)
        if replace:
            os.replace(temporary, final)
            flush_folder(final.parent)
            return
        try:
            os.link(temporary, final)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not final.exists():
                os.replace(temporary, final)
        remove(temporary)
