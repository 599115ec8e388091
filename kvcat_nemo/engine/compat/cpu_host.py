"""Lets Megatron-core, which is written for CUDA, run unchanged on a machine without one.

`enable` answers `torch.cuda` bookkeeping for the CPU, sends `device="cuda"` and `.cuda()` to the CPU, and points Megatron's
random-state tracker at the CPU generator. Transformer Engine and apex are hidden, since Megatron takes their optimizers and norms
wherever they are installed, and those are CUDA kernels. Checked with torch 2.9 to 2.13 and megatron-core 0.15.3.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys

import torch
from torch.overrides import TorchFunctionMode

from kvcat_nemo.engine.compat import MEGATRON, TORCH

_CPU = torch.device("cpu")
_enabled = False


def _names_cuda(target: object) -> bool:
    if isinstance(target, torch.device):
        return target.type == "cuda"
    return isinstance(target, str) and target.split(":")[0] == "cuda"


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Redirects every request for a CUDA tensor to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's gradient clipping compares this string with 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _NullStream:
    """A CUDA stream or event on a host that has none: every method does nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def _keep_freed_memory() -> bool:
    """Tell glibc's allocator to use freed memory again instead of handing it back to the kernel.

    It maps blocks above 32 MiB anew at each use, and the kernel clears them. A paired pass has twice the tensors above
    that size: on SmolLM2-135M at 2048 tokens a step took 8 % longer, the plain one 3 % (docs/LOG.md).

    Returns:
        False where the allocator is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


_CUDA_ALONE = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C")
hidden: set[str] = set()
"""Of those, the installed ones that this process cannot import."""


def _hide_cuda_packages() -> None:
    """Let Megatron and NeMo find no package whose functions are CUDA kernels."""
    for name in _CUDA_ALONE:
        if name not in sys.modules:
            if importlib.util.find_spec(name) is not None:
                hidden.add(name)
            sys.modules[name] = None  # import raises ModuleNotFoundError, find_spec answers None
    # `nemo llm` may have imported Megatron before it looks for recipes: what it took then is replaced.
    optimizers = [
        module
        for name in ("", ".optimizer", ".clip_grads", ".distrib_optimizer")
        if (module := sys.modules.get(f"megatron.core.optimizer{name}")) is not None
    ]
    if not optimizers:
        return
    from megatron.core import utils

    for name in ("applier", "l2_norm", "scale"):
        MEGATRON.reach(utils, f"local_multi_tensor_{name}", "clip gradients on a CPU")
    own = {
        "Adam": torch.optim.AdamW,
        "SGD": torch.optim.SGD,
        "USING_PYTORCH_OPTIMIZER": True,
        "HAVE_APEX_OR_TE": False,
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "l2_norm_impl": utils.local_multi_tensor_l2_norm,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
    }
    for module in optimizers:
        for name in own.keys() & vars(module).keys():
            setattr(module, name, own[name])


def _answer(names: str, make) -> None:
    # One function object per name: torch.compile's tables refuse two names for one object.
    for name in names.split():
        TORCH.reach(torch.cuda, name, "answer it on a CPU")
        setattr(torch.cuda, name, functools.partial(make))


def enable() -> None:
    """Put the stand-ins in place, once per process. For a machine without CUDA."""
    global _enabled
    if _enabled:
        return
    _enabled = True
    _keep_freed_memory()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if torch.version.cuda:
        # A torch for CUDA on a machine without a GPU (a login node, an image's build): Megatron-core compiles something when it
        # is imported, for the devices that it finds, and fails where there are none. Its build may fail, and is caught.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0")

    def nothing(*args, **kwargs):
        return None

    def zero(*args, **kwargs):
        return 0

    _answer("current_device", lambda *args: _CPU)
    _answer("set_device synchronize empty_cache ipc_collect reset_peak_memory_stats", nothing)
    _answer("max_memory_allocated max_memory_reserved memory_allocated memory_reserved", zero)
    _answer("current_stream default_stream Stream Event", lambda *args, **kwargs: _NullStream())
    _answer("stream", lambda stream: contextlib.nullcontext())
    _answer("get_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _answer("set_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    _answer("manual_seed manual_seed_all", lambda seed: torch.random.default_generator.manual_seed(seed))
    torch.cuda.nvtx.range_push = nothing
    torch.cuda.nvtx.range_pop = nothing
    torch.nn.Module.cuda = lambda self, device=None: self
    # Megatron decorates small fusions with torch.compile; on the CPU they run as written.
    torch.compile = lambda model=None, **kwargs: model if model is not None else (lambda fn: fn)
    _CudaNamesMeanCpu().__enter__()
    _hide_cuda_packages()

    import megatron.core.tensor_parallel.random as megatron_random

    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        MEGATRON.reach(megatron_random, name, "keep random states on a CPU")
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    barrier = torch.distributed.barrier

    @functools.wraps(barrier)
    def barrier_without_device_ids(group=None, async_op=False, device_ids=None):
        return barrier(group, async_op)  # gloo has no device-bound barriers

    torch.distributed.barrier = barrier_without_device_ids
    for name in ("all_reduce", "reduce_scatter_tensor"):
        setattr(torch.distributed, name, _averaging(getattr(torch.distributed, name)))


def _averaging(collective):
    """A sum over ranks that also knows ReduceOp.AVG, which gloo does not: what is to be averaged is divided first."""

    @functools.wraps(collective)
    def reduce(output, *args, **kwargs):
        if kwargs.get("op") == torch.distributed.ReduceOp.AVG:
            kwargs["op"] = torch.distributed.ReduceOp.SUM
            (args[0] if args else output).div_(torch.distributed.get_world_size(kwargs.get("group")))
        return collective(output, *args, **kwargs)

    return reduce
