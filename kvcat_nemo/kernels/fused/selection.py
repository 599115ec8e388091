"""Which fused kernel computes attention: one function decides, the configuration may overrule it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch

from kvcat_nemo.kernels.fused.interface import FusedKernel

BACKENDS = {
    "cpu": "kvcat_nemo.kernels.fused.cpu:CpuKernel",
    "te": "kvcat_nemo.kernels.fused.te:TransformerEngineKernel",
    "flash": "kvcat_nemo.kernels.fused.flash:FlashKernel",
    "torch": "kvcat_nemo.kernels.fused.torch_flash:TorchKernel",
    "oracle": None,
}
"""Name → class. `oracle` is no kernel: the dense float64 form of method/attention.py, for tests and small models."""

PACKAGES = {"te": "transformer_engine", "flash": "flash_attn"}
"""What a backend needs beside PyTorch."""

AUTOMATIC = {"cpu": ("cpu",), "cuda": ("te", "flash", "torch")}
"""Device → what `auto` tries there, in this order: the first that is installed and takes the call."""

logger = logging.getLogger("kvcat_nemo.attention")


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def kernel(name: str) -> FusedKernel:
    """The kernel of that name.

    Raises:
        ValueError: when its package is not installed.
    """
    package = PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"attention_backend={name}: the package {package} is not installed; install it, or use auto or torch"
        )
    module, _, cls = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), cls)()


def select_backend(
    name: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    gated: bool = True,
    recent_window: int = 1,
    packed: bool = False,
    split: bool = False,
    spans: bool = False,
) -> str:
    """Resolve `auto` and refuse what the backend cannot do.

    Args:
        name: one of BACKENDS or `auto`: `cpu` for tensors there; on CUDA the first of `te`, `flash` and `torch` that is
            installed and takes what the other arguments say.
        gated: whether gates take part, or plain causal attention is meant; recent_window: of the gated call.
        packed: several documents in one window; split: one window on several ranks; spans: gates apply to
            rows behind a cut alone.

    Returns:
        a name of BACKENDS.

    Raises:
        ValueError: that names what does not fit, and the fix.
    """
    if packed and split:
        raise ValueError(
            "packed documents in a window that is split over context-parallel ranks are not supported: set "
            "data.packed_documents=False, or context_parallel_size=1"
        )
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"attention_backend={name!r}: choose one of auto, {', '.join(BACKENDS)}")
    device = torch.device(device)
    if gated and dtype == torch.float16:
        raise ValueError(
            "attention: float16 cannot hold the weights of dropped slots (e^60); train in bfloat16 or float32"
        )

    def check(candidate: str) -> None:
        chosen = kernel(candidate)
        for widths, window, causal in _calls(chosen, head_dim, dtype, gated, recent_window, split or spans):
            chosen.check(
                head_dim_qk=widths[0],
                head_dim_v=widths[1],
                dtype=dtype,
                device=device,
                window=window,
                packed=packed,
                causal=causal,
            )

    if name == "auto":
        return _automatic(device, check)
    if name != "oracle":
        check(name)
    return name


def _calls(
    chosen: FusedKernel, head_dim: int, dtype: torch.dtype, gated: bool, recent_window: int, chunks: bool
):
    """(widths, window, causal) of the kernel calls that one attention makes. chunks: of queries, over earlier slots."""
    from kvcat_nemo.kernels.attention.gated_past import extra_columns

    plain = wide = chosen.widths(head_dim, head_dim)
    if gated:
        qk, v = extra_columns(dtype)
        wide = chosen.widths(head_dim + qk, head_dim + v)
    calls = [(wide, None, True)]
    if chunks:
        calls.append((wide, None, False))
    if gated and recent_window > 1:
        calls.append((plain, recent_window, True))
    return calls


def _automatic(device: torch.device, check: Callable[[str], None]) -> str:
    """The first of the device's backends that is installed and passes the check."""
    candidates = AUTOMATIC.get(device.type)
    if candidates is None:
        raise ValueError(
            f"attention_backend=auto: no fused attention for {device.type} tensors; use cpu or cuda"
        )
    if len(candidates) == 1:
        check(candidates[0])
        return candidates[0]
    missing, unfit = {}, {}
    for name in candidates:
        package = PACKAGES.get(name)
        if package and not _installed(package):
            missing[name] = f"{package} is not installed"
            continue
        try:
            check(name)
        except ValueError as error:
            unfit[name] = str(error)
        else:
            for other, why in unfit.items():
                _say_once(logging.WARNING, f"attention backend {other} is passed over for {name}: {why}")
            return name
    reasons = "; ".join(f"{name}: {why}" for name, why in (missing | unfit).items())
    raise ValueError(f"attention_backend=auto: no kernel fits on {device.type}: {reasons}")


def announce(name: str, q: torch.Tensor) -> None:
    """Say once, on the first rank, which kernel computes attention of such queries, [..., head dim]."""
    if name == "auto":
        name = select_backend(name, device=q.device, dtype=q.dtype, head_dim=q.shape[-1], gated=False)
    text = f"attention backend: {name} ({q.device.type}, {q.dtype}, head dim {q.shape[-1]})"
    _say_once(logging.INFO, text)


def _say_once(level: int, text: str) -> None:
    if text in _said:
        return
    _said.add(text)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    if not logger.hasHandlers():  # nobody set up logging: a run says it all the same
        logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    logger.log(level, "%s", text)


_said: set[str] = set()
