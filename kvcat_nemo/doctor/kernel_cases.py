"""What a fused kernel must do on a GPU for gated attention to be right, case by case; the tests run the same on the CPU.

bf16 is held to Transformer Engine's own bound, 1.5e-2, against float64 from the same rounded inputs. A case raises
`Wrong` with what it saw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kvcat_nemo.doctor.kernel_oracle import random_case, reference
from kvcat_nemo.kernels import causal_attention, gated_attention, select_backend, span_gated_attention
from kvcat_nemo.kernels.attention.context_parallel import WindowSplit
from kvcat_nemo.kernels.attention.context_parallel_kernel import SplitKernel
from kvcat_nemo.kernels.fused.selection import BACKENDS, kernel
from kvcat_nemo.method.attention import gated_attention_reference, span_gated_attention_reference
from kvcat_nemo.method.spans import Spans

BOUND = 1.5e-2


class Wrong(AssertionError):
    """A result that is not what it must be."""


@dataclass(frozen=True)
class KernelHost:
    """Where a case runs."""

    backend: str
    device: str
    tokens: int
    """Window length: long enough for several tiles on a GPU, short enough for the CPU."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def packed_tokens(self) -> tuple[int, int]:
        """Below and above 1,024 and no power of two: Transformer Engine pads the packed statistics of both."""
        return (512, 3072) if self.cuda else (48, 80)


HOSTS = {"cpu": KernelHost("cpu", "cpu", 96)} | {
    name: KernelHost(name, "cuda", 1024) for name in BACKENDS if name not in ("cpu", "oracle")
}


def require(condition: bool, what: object) -> None:
    if not condition:
        raise Wrong(str(what))


def close(name: str, value: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    """Relative error in the norm, and no entry off by much: entries that cancel keep bf16's absolute error."""
    value, expected = value.cpu().double(), expected.cpu().double()
    require(bool(torch.isfinite(value).all()), f"{name}: not finite")
    error = float((value - expected).norm() / expected.norm().clamp(min=1e-2 * expected.numel() ** 0.5))
    require(error <= bound, f"{name}: relative error {error:.3g}, bound {bound:g}")
    worst = float(((value - expected).abs() - bound * expected.abs()).max())
    allowed = bound * float(expected.abs().max())
    require(worst <= allowed, f"{name}: an entry is off by {worst:.3g}, allowed {allowed:.3g}")


def gated_case(host, D=64, heads=(8, 2), *, keep=0.5, seed=0, gate_heads=None, tokens=None) -> list[Tensor]:
    """(q, k, v, gate, do) in bf16, gates hard and soft in float32, on the host's device."""
    H, G = heads
    rng = torch.Generator().manual_seed(seed)
    T = tokens or host.tokens
    sizes = [(1, T, H, D), (1, T, G, D), (1, T, G, D), (1, T, H, D)]
    q, k, v, do = (torch.randn(size, generator=rng).bfloat16() for size in sizes)
    gate = torch.rand(1, T, gate_heads or G, generator=rng)
    gate = torch.where(gate > keep, 0.0, torch.where(gate < keep / 2, 1.0, gate))
    return [x.to(host.device) for x in (q, k, v, gate, do)]


def gradients(function, tensors, do, **settings) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, scale=tensors[0].shape[-1] ** -0.5, **settings)
    return [out.detach(), *torch.autograd.grad((out * do.to(out.dtype)).sum(), leaves)]


def compare(host, tensors, do, **settings) -> list[Tensor]:
    """Output and all gradients against the float64 oracle."""
    found = gradients(gated_attention, tensors, do, backend=host.backend, **settings)
    exact = gradients(gated_attention_reference, [x.double() for x in tensors], do, **settings)
    for name, value, expected in zip(("o", "dq", "dk", "dv", "dgate"), found, exact, strict=True):
        close(name, value, expected)
    return found


def kernel_against_float64(host, widths, window) -> None:
    fused = kernel(host.backend)
    settings = {"dtype": torch.bfloat16, "device": host.device, "window": window}
    shape = (2, host.tokens, 8, 2, *fused.widths(*widths))
    fused.check(head_dim_qk=shape[4], head_dim_v=shape[5], **settings)
    q, k, v, do = (x.to(host.device) for x in random_case(shape, torch.bfloat16))
    q[..., widths[0] :] = k[..., widths[0] :] = 0
    call = {"scale": widths[0] ** -0.5, "window": window}
    o, lse, saved = fused.forward(q, k, v, **call)
    found = (o, lse, *fused.backward(do, q, k, v, o, lse, saved, **call))
    for name, value, expected in zip(
        ("o", "lse", "dq", "dk", "dv"), found, reference(q, k, v, do, **call), strict=True
    ):
        close(name, value, expected)


def every_rank_of_a_split_window(host, widths, window) -> None:
    """Context parallelism's calls (no causality, more slots than queries, a window that begins in the chunk before)."""
    fused = kernel(host.backend)
    wide = fused.widths(*widths)
    for causal in (True, False):
        fused.check(
            head_dim_qk=wide[0], head_dim_v=wide[1], dtype=torch.bfloat16, device=host.device, causal=causal
        )
    q, k, v, do = (x.to(host.device) for x in random_case((2, host.tokens, 8, 2, *wide), torch.bfloat16))
    q[..., widths[0] :] = k[..., widths[0] :] = 0
    call = {"scale": widths[0] ** -0.5, "window": window}
    exact = reference(q, k, v, do, **call)
    sums = [torch.zeros(x.shape, device=host.device) for x in (k, v)]
    for rank in range(2):
        split = WindowSplit(None, 2, rank)
        own = split.positions(host.tokens // 2).to(host.device)
        both = SplitKernel(fused, split)
        q_, do_ = (x[:, own] for x in (q, do))
        o, lse, saved = both.forward(q_, k, v, **call)
        dq, *rest = both.backward(do_, q_, k, v, o, lse, saved, **call)
        sums = [a + b for a, b in zip(sums, rest, strict=True)]
        found = (o, exact[0][:, own]), (lse, exact[1][..., own]), (dq, exact[2][:, own])
        for name, (value, expected) in zip(("o", "lse", "dq"), found, strict=True):
            close(name, value, expected)
    for name, value, expected in zip(("dk", "dv"), sums, exact[3:], strict=True):
        close(name, value, expected)


def backward_believes_what_it_is_given(host) -> None:
    """What the algebra of gates rests on: weights above one, and any δ."""
    fused = kernel(host.backend)
    q, k, v, do = (x.to(host.device) for x in random_case((1, 64, 4, 2, 72, 72), torch.bfloat16))
    call = {"scale": 0.1, "window": None}
    o, lse, saved = fused.forward(q, k, v, **call)
    plain = fused.backward(do, q, k, v, torch.zeros_like(o), lse, saved, **call)
    raised = fused.backward(do, q, k, v, torch.zeros_like(o), lse - 20.0, saved, **call)
    for name, one, other in zip(("dq", "dk", "dv"), plain, raised, strict=True):
        close(name, other.double() / torch.e**20, one.double(), bound=5e-2)


def gates_and_their_gradient(host, D, **settings) -> None:
    *tensors, do = gated_case(host, D)
    *_, dgate = compare(host, tensors, do, **settings)
    require(float(dgate[tensors[3] == 0].abs().max()) > 0, "dropped slots' gates have no gradient")


def gate_shared_by_all_heads(host) -> None:
    *tensors, do = gated_case(host, gate_heads=1)
    compare(host, tensors, do)


def every_earlier_slot_dropped(host) -> None:
    *tensors, do = gated_case(host)
    tensors[3] = torch.zeros_like(tensors[3])
    found = compare(host, tensors, do)
    close("o", found[0], tensors[2].repeat_interleave(4, 2))


def dropped_slot_far_above(host, gap) -> None:
    q, k, v, gate, do = gated_case(host)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, 1, :, 0], gate[:, 1] = gap, 0.0
    compare(host, [q, k, v, gate], do)


def dropped_slot_reaches_no_other_row(host) -> None:
    *tensors, _ = gated_case(host)
    tensors[3][:, 5] = 0
    loud = [x.clone() for x in tensors]
    loud[2][:, 5] = 1e30
    before, after = (gated_attention(*x, scale=0.125, backend=host.backend) for x in (tensors, loud))
    same = torch.arange(host.tokens, device=host.device) != 5
    require(torch.equal(before[:, same], after[:, same]), "another row changed")
    require(float(after[:, 5].abs().min()) > 1e28, "its own row did not")


def packed_documents(host, tokens=None, **settings) -> None:
    T = tokens or host.tokens
    *tensors, do = gated_case(host, tokens=T)
    bounds = torch.tensor([0, 33, 34, T], dtype=torch.int32, device=host.device)
    found = compare(host, tensors, do, cu_seqlens=bounds, **settings)
    piece = gated_attention(*(x[:, 34:] for x in tensors), scale=0.125, backend=host.backend, **settings)
    close("the last document alone", found[0][:, 34:], piece)


def gates_behind_a_cut(host, cuts) -> None:
    """Cuts as fractions of the window, or as whole tokens: from its start, or (negative) from its end."""
    *tensors, do = gated_case(host)
    T = host.tokens
    places = [cut % T if isinstance(cut, int) else int(cut * T) for cut in cuts]
    spans = Spans.from_cuts([places], T)
    found = gradients(span_gated_attention, tensors, do, backend=host.backend, spans=spans)
    exact = gradients(span_gated_attention_reference, [x.double() for x in tensors], do, spans=spans)
    for name, value, expected in zip(("o", "dq", "dk", "dv", "dgate"), found, exact, strict=True):
        close(name, value, expected)


def plain_attention(host) -> None:
    q, k, v, _, do = gated_case(host)
    out = causal_attention(q, k, v, scale=0.125, backend=host.backend)
    close("o", out, reference(q, k, v, do, scale=0.125)[0])


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return result


def peak(host, tokens: int) -> int:
    """Bytes at the peak of one forward and backward beyond its inputs (CUDA), elements of the largest tensor (CPU)."""
    *tensors, do = gated_case(host, tokens=tokens)
    if not host.cuda:
        with _Largest() as largest:
            gradients(gated_attention, tensors, do, backend=host.backend)
        return largest.most
    gradients(gated_attention, tensors, do, backend=host.backend)  # workspaces and plans
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(gated_attention, tensors, do, backend=host.backend)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_grows_with_the_tokens(host) -> None:
    sizes = (4096, 8192, 16384) if host.cuda else (256, 512, 1024)
    first, second, third = (peak(host, tokens) for tokens in sizes)
    require(second <= 2.2 * first and third <= 2.2 * second, ("grows faster", first, second, third))
    # One score matrix of one head in bf16 would be twice this.
    require(third < sizes[-1] ** 2 * (1 if not host.cuda else 8), ("a score matrix was made", third))


RAN = {  # compute capability → head dim → what Transformer Engine should run gates on, in its order of preference
    (8, 0): {64: ("flash2", "cudnn"), 128: ("flash2",)},
    (9, 0): {64: ("cudnn",), 128: ("cudnn",)},
    (10, 0): {64: ("cudnn",), 128: ("cudnn", "flash2")},
}


def ran_on_the_expected_backend(host, D) -> str:
    """What Transformer Engine chose; other kernels have no choice.

    Raises:
        LookupError: when nothing is claimed of this device or kernel.
    """
    if host.backend != "te":
        raise LookupError(f"{host.backend} is one kernel, and makes no choice")
    capability = torch.cuda.get_device_capability()
    if capability not in RAN:
        raise LookupError(f"nothing is claimed of compute capability {capability}")
    *tensors, do = gated_case(host, D)
    gradients(gated_attention, tensors, do, backend="te")
    chosen = kernel("te").last.name
    require(chosen in RAN[capability][D], f"{chosen} ran, {' or '.join(RAN[capability][D])} was expected")
    return chosen


# Transformer Engine's test shapes with unequal widths, and those that gates need.
WIDTHS = [(64, 64), (72, 72), (96, 96), (96, 64), (128, 128), (136, 136), (192, 128)]
SPLIT_WIDTHS = [(64, 64), (72, 72), (136, 136)]


def _cases() -> dict[str, Callable[[KernelHost], object]]:
    make = functools.partial
    out: dict[str, Callable] = {}
    for widths in WIDTHS:
        for window in (None, 64):
            out[f"kernel {widths}, window {window}"] = make(
                kernel_against_float64, widths=widths, window=window
            )
    for widths in SPLIT_WIDTHS:
        for window in (None, 64):
            out[f"split window {widths}, window {window}"] = make(
                every_rank_of_a_split_window, widths=widths, window=window
            )
    out["backward believes lse and o"] = backward_believes_what_it_is_given
    for D in (32, 64, 96, 128):
        for settings in ({}, {"recent_window": 32}, {"sinks": 4}):
            name = ", ".join(f"{k} {v}" for k, v in settings.items()) or "plain"
            out[f"gates D {D}, {name}"] = make(gates_and_their_gradient, D=D, **settings)
    out["gate shared by all heads"] = gate_shared_by_all_heads
    out["every earlier slot dropped"] = every_earlier_slot_dropped
    for gap in (60.0, 500.0):
        out[f"dropped slot {gap:g} above"] = make(dropped_slot_far_above, gap=gap)
    out["a dropped slot reaches no other row"] = dropped_slot_reaches_no_other_row
    for settings in ({}, {"recent_window": 16}):
        name = ", ".join(f"{k} {v}" for k, v in settings.items()) or "plain"
        out[f"packed documents, {name}"] = make(packed_documents, **settings)
    for which in (0, 1):
        out[f"packed documents, {'short' if not which else 'long'}"] = make(_packed_of, which=which)
    # One slot before the cut, one row behind it, and both in one window: the smallest calls that a cut makes.
    for cuts in ((0.5,), (0.1, 0.3, 0.9), (1,), (-1,), (1, -1)):
        out[f"gates behind a cut at {', '.join(map(str, cuts))}"] = make(gates_behind_a_cut, cuts=cuts)
    out["plain attention"] = plain_attention
    out["memory grows with the tokens"] = memory_grows_with_the_tokens
    for D in (64, 128):
        out[f"which backend ran, D {D}"] = make(ran_on_the_expected_backend, D=D)
    return out


def asked_of(case: Callable) -> dict[str, object]:
    """What `select_backend` would be asked for a case's attention, beside backend, device and dtype."""
    function = getattr(case, "func", case)
    settings = getattr(case, "keywords", {})
    widths = settings.get("widths", (72, 72) if function is backward_believes_what_it_is_given else (64, 64))
    bare = function in (kernel_against_float64, every_rank_of_a_split_window)
    return {
        "head_dim": settings.get("D", max(widths)),
        "gated": not bare and function not in (plain_attention, backward_believes_what_it_is_given),
        "recent_window": settings.get("recent_window", 1),
        "packed": function in (packed_documents, _packed_of),
        "split": function is every_rank_of_a_split_window,
        "spans": function is gates_behind_a_cut,
    }


def run_case(host: KernelHost, case: Callable) -> object:
    """Run a case; a kernel that refuses its attention by name is no failure where `auto` trains with another one.

    Raises:
        LookupError: with the refusal.
        Wrong, ValueError, …: what the case raises otherwise; and `auto`'s refusal when no kernel serves.
    """
    try:
        return case(host)
    except ValueError:
        wanted = {"device": host.device, "dtype": torch.bfloat16} | asked_of(case)
        try:
            select_backend(host.backend, **wanted)
        except ValueError as error:
            refusal = str(error)
        else:
            raise
    raise LookupError(f"{refusal} (auto: {select_backend('auto', **wanted)})")


def _packed_of(host, which: int) -> None:
    packed_documents(host, tokens=host.packed_tokens[which])


CASES = _cases()
"""Name → case."""
