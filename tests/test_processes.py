"""Children end with their parent, however it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")

PROGRAM = """
import os, sys, time
from kvcat_nemo.common.processes import children_die_with_us
if sys.argv[1] == "yes":
    children_die_with_us()
child = os.fork()
if child == 0:
    grandchild = os.fork()
    if grandchild == 0:
        time.sleep(60)
    print(os.getpid(), grandchild, flush=True)
    time.sleep(60)
time.sleep(60)
"""


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("asked", ["yes", "no"])
def test_children_of_a_killed_process(asked):
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM, asked], stdout=subprocess.PIPE, text=True)
    children = [int(x) for x in parent.stdout.readline().split()]
    assert len(children) == 2 and all(map(alive, children))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (5 if asked == "yes" else 0.5)
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for pid in children if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    parent.stdout.close()
    assert bool(left) == (asked == "no")
