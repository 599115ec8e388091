"""Files and folders that are either complete or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path


def sha256_of(path: str | os.PathLike) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_name(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial-{socket.gethostname()}-{os.getpid()}")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sweep(final: Path) -> None:
    """Remove what killed processes of this host left behind; another host's may still be at work."""
    prefix = f".{final.name}.partial-{socket.gethostname()}-"
    for leftover in final.parent.glob(".*.partial-*"):
        pid = leftover.name.removeprefix(prefix)
        if pid != leftover.name and pid.isdigit() and (int(pid) == os.getpid() or not _runs(int(pid))):
            _remove(leftover)


@contextlib.contextmanager
def _complete_or_absent(final: Path) -> Iterator[Path]:
    final.parent.mkdir(parents=True, exist_ok=True)
    _sweep(final)
    temporary = _temporary_name(final)
    try:
        yield temporary
    except BaseException:
        _remove(temporary)
        raise


@contextlib.contextmanager
def new_file(final: str | os.PathLike, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `final`; what was written there becomes `final` when the block succeeds.

    replace=False: a `final` that another process has made meanwhile stays.
    """
    final = Path(final)
    with _complete_or_absent(final) as temporary:
        yield temporary
        if replace:
            os.replace(temporary, final)
            return
        try:
            os.link(temporary, final)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not final.exists():
                os.replace(temporary, final)
        _remove(temporary)


@contextlib.contextmanager
def new_folder(final: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder beside `final` that becomes `final` when the block succeeds.

    A folder that is already at `final` is replaced: the caller must have checked that it may be.
    """
    final = Path(final)
    with _complete_or_absent(final) as temporary:
        temporary.mkdir()
        yield temporary
        if final.exists():
            # A folder can't be renamed over a full one; the old one goes aside for the instant between.
            old = temporary.with_name(temporary.name.replace(".partial-", ".old.partial-", 1))
            os.rename(final, old)
            os.rename(temporary, final)
            _remove(old)
        else:
            os.rename(temporary, final)
