"""The sum over several test runs."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("totals.py")
RUN = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'


def total(tmp_path, *runs):
    paths = []
    for number, run in enumerate(runs):
        paths.append(tmp_path / f"{number}.xml")
        paths[-1].write_text(RUN.format(*run))
    return subprocess.run([sys.executable, SCRIPT, *paths], capture_output=True, text=True)


def test_runs_are_added_up(tmp_path):
    done = total(tmp_path, (10, 0, 0, 2), (5, 0, 0, 0))
    assert (done.stdout, done.returncode) == ("total: 13 passed, 0 failed, 2 skipped\n", 0)


def test_one_failure_or_error_in_any_run_fails(tmp_path):
    assert total(tmp_path, (10, 0, 0, 0), (5, 1, 1, 0)).stdout == "total: 13 passed, 2 failed, 0 skipped\n"
    assert total(tmp_path, (10, 1, 0, 0), (5, 0, 0, 0)).returncode == 1
    assert total(tmp_path, (10, 0, 0, 0), (5, 0, 1, 0)).returncode == 1
