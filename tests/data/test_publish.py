"""A folder is replaced only where that costs nothing that is not ours, and old and new are never lost both."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvcat_nemo.common import folders
from kvcat_nemo.common.folders import check_replaceable, new_folder


def ours(folder):
    """As a manifest would: it lists files, and is there only when the folder is complete."""
    mark = folder / "mark"
    return {"mark", *mark.read_text().split()} if mark.is_file() else None


def make(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "mark").write_text(" ".join(files))
    return folder


def state(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def replace(out, **options):
    with new_folder(out, ours, **options) as folder:
        (folder / "b").write_text("new")
        (folder / "mark").write_text("b")


def _foreign(name):
    def act(out):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")

    return act


def _link(out):
    other = make(out.parent / "other", a="old")
    for path in [*out.iterdir()]:
        path.unlink()
    out.rmdir()
    out.symlink_to(other)


REFUSED = {
    "a thesis": (_foreign("thesis.txt"), r"kvcat did not write .*out/thesis.txt"),
    "a thesis in a folder": (_foreign("deep/er/thesis.txt"), r"did not write .*out/deep/er/thesis.txt"),
    "a hidden file": (_foreign(".notes"), r"did not write .*out/.notes"),
    "no mark": (lambda out: (out / "mark").unlink(), "no complete mark"),
    "a config of anything": (
        lambda out: ((out / "mark").unlink(), (out / "config.json").write_text("{}")),
        "no complete mark",
    ),
    "a link": (_link, "is a symbolic link to .*other"),
    "a link to nothing": (
        lambda out: (out.rename(out.with_name("aside")), out.symlink_to(out.with_name("gone"))),
        "is a symbolic link",
    ),
    "a link within": (
        lambda out: ((out / "a").unlink(), (out / "a").symlink_to("/etc/hostname")),
        "did not write .*out/a",
    ),
    "a linked folder within": (
        lambda out: (out / "sub").symlink_to(out.parent),
        "did not write .*out/sub",
    ),
    "a file": (
        lambda out: (out.rename(out.with_name("aside")), out.write_text("mine")),
        "is a file; give a folder",
    ),
    "the working directory": (os.chdir, "is the working directory"),
    "a folder around it": (lambda out: ((out / "sub").mkdir(), os.chdir(out / "sub")), "holds the working directory"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = make(tmp_path / "out", a="old")
    spoil, message = REFUSED[case]
    spoil(out)
    before = state(tmp_path)
    with pytest.raises(ValueError, match=message):
        replace(out)
    with pytest.raises(ValueError, match=message):
        check_replaceable(out, ours)
    assert state(tmp_path) == before


@pytest.mark.parametrize("source", [".", "sub", "sub/model.safetensors", "link"])
def test_what_is_read_is_never_replaced(source, tmp_path):
    out = make(tmp_path / "out", a="old")
    (out / "sub").mkdir()
    if source == "link":
        source = tmp_path / "link"
        source.symlink_to(out)
    with pytest.raises(ValueError, match="out (is|holds) .*which is read"):
        replace(out, sources=[out / source])
    assert state(out) == {"a": "old", "mark": "a"}


def test_the_home_folder_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(make(tmp_path / "out", a="old")))
    with pytest.raises(ValueError, match="is your home folder"):
        replace(tmp_path / "out")


@pytest.mark.parametrize("exchange", [True, False])
def test_replaced(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    out = make(tmp_path / "out", a="old")
    inode = out.stat().st_ino
    replace(out)
    assert state(out) == {"b": "new", "mark": "b"} and out.stat().st_ino != inode
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    replace(tmp_path / "empty")
    assert state(tmp_path / "empty") == {"b": "new", "mark": "b"}


def test_a_path_through_a_link_is_fine(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to("disk")
    make(tmp_path / "disk" / "out", a="old")
    replace(tmp_path / "data" / "out")
    assert state(tmp_path / "disk" / "out") == {"b": "new", "mark": "b"}


def test_a_file_that_comes_while_we_work_is_kept(tmp_path, capsys):
    out = make(tmp_path / "out", a="old")
    with pytest.raises(ValueError, match="did not write .*late.txt"), new_folder(out, ours) as folder:
        (folder / "mark").write_text("")
        (out / "late.txt").write_text("mine")
    assert state(out) == {"a": "old", "mark": "a", "late.txt": "mine"}


def test_a_folder_that_appears_while_we_work_is_kept(tmp_path):
    """Without --force, another process that was faster keeps its result."""
    out = tmp_path / "out"
    with (
        pytest.raises(ValueError, match="appeared meanwhile"),
        new_folder(out, ours, replace=False) as folder,
    ):
        (folder / "mark").write_text("")
        make(out, a="theirs")
    assert state(out) == {"a": "theirs", "mark": "a"}


def test_a_file_that_comes_in_the_last_moment_is_kept(tmp_path, monkeypatch, capsys):
    out = make(tmp_path / "out", a="old")
    swap = folders._exchange
    monkeypatch.setattr(
        folders, "_exchange", lambda new, old: ((old / "late.txt").write_text("mine"), swap(new, old))[1]
    )
    replace(out)
    assert state(out) == {"b": "new", "mark": "b"}
    (kept,) = tmp_path.glob("out.replaced-*")
    assert state(kept)["late.txt"] == "mine" and str(kept) in capsys.readouterr().err


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from kvcat_nemo.data import publish
from test_publish import ours, replace
if {fallback}:
    publish._exchange = lambda *_: False
rename, count = os.rename, 0
def counted(*args):
    global count
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    rename(*args)
os.rename = counted
def swap(new, old, real=publish._exchange):
    if {at} == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    done = real(new, old)
    if done and {at} == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
publish._exchange = swap
replace(Path({out!r}))
"""


@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_kill_at_any_moment_costs_neither(fallback, at, tmp_path):
    """Before the replacement, between its two renames (where folders cannot change places), and after it."""
    out = make(tmp_path / "out", a="old")
    program = _KILLED.format(tests=str(Path(__file__).parent), fallback=fallback, at=at, out=str(out))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == (0 if at == 2 else -signal.SIGKILL), done.stderr
    # In one of the states, whole: in place, or beside it until the next write puts it back.
    folders.recover(out, ours)
    assert state(out) == ({"a": "old", "mark": "a"} if at == 0 else {"b": "new", "mark": "b"})
    replace(out)
    assert state(out) == {"b": "new", "mark": "b"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_arrays_that_are_pickles_are_refused(tmp_path):
    import pickle

    import numpy as np

    from kvcat_nemo.data.arrays import check_arrays

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path}/it-ran'",)

    cache = tmp_path / "train" / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    np.save(cache / "good.npy", np.arange(5))
    check_arrays([tmp_path, tmp_path / "nowhere"])
    bad = cache / "x-shuffle_index.npy"
    bad.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="x-shuffle_index.npy is no array"):
        check_arrays([tmp_path])
    assert not (tmp_path / "it-ran").exists()
    np.load(bad, allow_pickle=True, mmap_mode="r")  # as Megatron does: or this test could not fail
    assert (tmp_path / "it-ran").exists()
    np.save(bad, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="x-shuffle_index.npy holds Python objects"):
        check_arrays([tmp_path])
