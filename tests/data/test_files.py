import os
import signal
import subprocess
import sys

import pytest

from kvcat_nemo.common.files import new_file
from kvcat_nemo.common.folders import new_folder


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with new_folder(tmp_path / "out", lambda _: {"a"}) as folder:
        (folder / "b").write_text("2")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder_alone_and_nothing_new(tmp_path, error):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(error), new_folder(tmp_path / "out", lambda _: {"old"}) as folder:
        (folder / "new").write_text("2")
        raise error
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]
    with pytest.raises(error), new_file(tmp_path / "file") as file:
        file.write_text("2")
        raise error
    assert not (tmp_path / "file").exists()


def test_a_killed_process_leaves_nothing_that_looks_complete_and_is_swept_up(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from kvcat_nemo.common.folders import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'a').write_text('1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")])
    assert done.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".out.partial-")
    # A living process' folder must stay: here one named after this test's parent.
    alive = leftover.with_name(leftover.name.rsplit("-", 1)[0] + f"-{os.getppid()}")
    alive.mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["out", alive.name])
