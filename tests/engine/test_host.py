"""The CPU host: what it changes of the process."""

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys, torch
from pathlib import Path
if sys.argv[1] == "enabled":
    from kvcat_nemo.engine import host
    assert host.enable()

def resident():
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")).split()[1])

before = resident()
block = torch.ones(2**26)  # 256 MiB
del block
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the host of a machine without CUDA")
def test_freed_memory_is_kept_for_the_next_step():
    kept = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )
        for mode in ("plain", "enabled")
    }
    assert kept["plain"] < 2**16 and kept["enabled"] > 2**17, kept  # KiB
