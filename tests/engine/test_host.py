"""The CPU host: what it changes of the process."""

import os
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import sys, torch
from pathlib import Path
if sys.argv[1] == "enabled":
    from kvcat_nemo.engine import hardware
    assert hardware.enable()

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


KERNELS = """
class FusedAdam:
    def __init__(self, *args, **kwargs):
        raise RuntimeError("a CUDA kernel on CPU tensors")

class FusedSGD(FusedAdam):
    pass

def multi_tensor_applier(*args):
    raise RuntimeError("a CUDA kernel on CPU tensors")

multi_tensor_l2norm = multi_tensor_scale = multi_tensor_applier
"""
FILES = {
    "transformer_engine": {
        "transformer_engine/__init__.py": "__version__ = '2.9.0'",
        "transformer_engine/pytorch/__init__.py": "",
        "transformer_engine/pytorch/optimizers.py": KERNELS,
    },
    "apex": {
        "apex/__init__.py": "",
        "apex/optimizers.py": KERNELS,
        "apex/multi_tensor_apply.py": KERNELS,
        "amp_C.py": KERNELS,
    },
}
STEP = """
import sys
package, order = sys.argv[1:]
if order == "megatron first":
    import megatron.core.optimizer as before
    assert before.Adam.__module__.startswith(package), before.Adam
from kvcat_nemo.engine import hardware
assert hardware.enable()
import torch
from megatron.core.optimizer import Adam, USING_PYTORCH_OPTIMIZER, clip_grads, distrib_optimizer, optimizer

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.full((3,), 2.0)
adam = Adam([weight], lr=0.1)
norm = clip_grads.get_grad_norm_fp32([weight.grad])
clip_grads.clip_grad_by_total_norm_fp32([weight], 1.0, norm)
optimizer._multi_tensor_copy_this_to_that([weight.grad.bfloat16()], [torch.zeros(3).bfloat16()])
adam.step()
assert abs(norm - 12**0.5) < 1e-5 and float(weight[0]) < 1 and USING_PYTORCH_OPTIMIZER
assert issubclass(torch.optim.AdamW, distrib_optimizer.Adam) and not distrib_optimizer.HAVE_APEX_OR_TE
assert hardware.installed(package) and not hardware.installed({"apex": "transformer_engine"}.get(package, "apex"))
if order == "enabled first":
    try:
        __import__(package)
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("it can be imported")
print("stepped")
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(torch.cuda.is_available(), reason="the host of a machine without CUDA")
@pytest.mark.parametrize(
    ("package", "order"),
    [("transformer_engine", "enabled first"), ("apex", "enabled first"), ("apex", "megatron first")],
)
def test_megatron_steps_where_packages_of_cuda_kernels_are_installed(tmp_path, package, order):
    """An image for GPUs on a CPU, as the doctor's reference is: Megatron would take their optimizer and norms."""
    for name, text in FILES[package].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", STEP, package, order],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"},
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.split()[-1] == "stepped", done.stderr[-3000:]
