"""What to run on the first machine with a GPU: `pytest -m gpu tests/kernels/test_gpu.py`.

Every body also runs on the CPU with its fused kernel, so that nothing here is first executed on that machine; with CUDA
it runs on PyTorch's own kernels and, where installed, on Transformer Engine's and flash-attn's. bf16 is held to Transformer Engine's own bound,
1.5e-2, against float64 from the same rounded inputs.
"""

import importlib.util
from dataclasses import dataclass, replace

import kernel_checks
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcat_nemo.kernels import causal_attention, gated_attention, span_gated_attention
from kvcat_nemo.kernels.backends import kernel
from kvcat_nemo.kernels.split_kernel import SplitKernel
from kvcat_nemo.kernels.window_split import WindowSplit
from kvcat_nemo.method.attention import gated_attention_reference, span_gated_attention_reference
from kvcat_nemo.method.spans import Spans

BOUND = 1.5e-2


@dataclass(frozen=True)
class Host:
    """Where a test runs."""

    backend: str
    device: str
    tokens: int
    """Window length: long enough for several tiles on a GPU, short enough for the CPU."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


HOSTS = {
    "cpu": Host("cpu", "cpu", 96),
    "te": Host("te", "cuda", 1024),
    "flash": Host("flash", "cuda", 1024),
    "torch": Host("torch", "cuda", 1024),
}
PACKAGES = {"te": "transformer_engine", "flash": "flash_attn"}


@pytest.fixture(
    params=["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in HOSTS if name != "cpu")]
)
def host(request):
    host = HOSTS[request.param]
    if host.cuda:
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: this test has only run on the CPU")
        package = PACKAGES.get(host.backend)
        if package and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return host


def gated_case(host, D=64, heads=(8, 2), *, keep=0.5, seed=0, gate_heads=None):
    """(q, k, v, gate, do) in bf16, gates hard and soft in float32, on the host's device."""
    H, G = heads
    rng = torch.Generator().manual_seed(seed)
    T = host.tokens
    sizes = [(1, T, H, D), (1, T, G, D), (1, T, G, D), (1, T, H, D)]
    q, k, v, do = (torch.randn(size, generator=rng).bfloat16() for size in sizes)
    gate = torch.rand(1, T, gate_heads or G, generator=rng)
    gate = torch.where(gate > keep, 0.0, torch.where(gate < keep / 2, 1.0, gate))
    return [x.to(host.device) for x in (q, k, v, gate, do)]


def gradients(function, tensors, do, **settings):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, scale=tensors[0].shape[-1] ** -0.5, **settings)
    return [out.detach(), *torch.autograd.grad((out * do.to(out.dtype)).sum(), leaves)]


def close(name, value, expected):
    """Relative error in the norm, and no entry off by much: entries that cancel keep bf16's absolute error."""
    value = value.cpu().double()
    assert torch.isfinite(value).all(), name
    error = (value - expected).norm() / expected.norm().clamp(min=1e-2 * expected.numel() ** 0.5)
    assert error <= BOUND, (name, error)
    torch.testing.assert_close(
        value, expected, rtol=BOUND, atol=BOUND * expected.abs().max().item(), msg=name
    )


def compare(host, tensors, do, **settings):
    """Output and all gradients against the float64 oracle on the CPU."""
    found = gradients(gated_attention, tensors, do, backend=host.backend, **settings)
    if settings.get("cu_seqlens") is not None:
        settings["cu_seqlens"] = settings["cu_seqlens"].cpu()
    exact = gradients(gated_attention_reference, [x.cpu().double() for x in tensors], do.cpu(), **settings)
    for name, value, expected in zip(("o", "dq", "dk", "dv", "dgate"), found, exact, strict=True):
        close(name, value, expected)
    return found


# Transformer Engine's test shapes with unequal widths, and those that gates need.
WIDTHS = [(64, 64), (72, 72), (96, 96), (96, 64), (128, 128), (136, 136), (192, 128)]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("window", [None, 64])
def test_kernel_against_float64(host, widths, window):
    fused = kernel(host.backend)
    settings = {"dtype": torch.bfloat16, "device": host.device, "window": window}
    shape = (2, host.tokens, 8, 2, *fused.widths(*widths))
    fused.check(head_dim_qk=shape[4], head_dim_v=shape[5], **settings)
    q, k, v, do = (x.to(host.device) for x in kernel_checks.case(shape, torch.bfloat16))
    q[..., widths[0] :] = k[..., widths[0] :] = 0
    call = {"scale": widths[0] ** -0.5, "window": window}
    o, lse, saved = fused.forward(q, k, v, **call)
    found = (o, lse, *fused.backward(do, q, k, v, o, lse, saved, **call))
    exact = kernel_checks.reference(*(x.cpu() for x in (q, k, v, do)), **call)
    for name, value, expected in zip(("o", "lse", "dq", "dk", "dv"), found, exact, strict=True):
        close(name, value, expected)


@pytest.mark.parametrize("widths", [(64, 64), (72, 72), (136, 136)], ids=str)
@pytest.mark.parametrize("window", [None, 64])
def test_every_rank_of_a_split_window(host, widths, window):
    """Context parallelism's calls (no causality, more slots than queries, a window that begins in the chunk before)."""
    fused = kernel(host.backend)
    for causal in (True, False):
        fused.check(
            head_dim_qk=fused.widths(*widths)[0],
            head_dim_v=fused.widths(*widths)[1],
            dtype=torch.bfloat16,
            device=host.device,
            causal=causal,
        )
    shape = (2, host.tokens, 8, 2, *fused.widths(*widths))
    q, k, v, do = (x.to(host.device) for x in kernel_checks.case(shape, torch.bfloat16))
    q[..., widths[0] :] = k[..., widths[0] :] = 0
    call = {"scale": widths[0] ** -0.5, "window": window}
    exact = kernel_checks.reference(*(x.cpu() for x in (q, k, v, do)), **call)
    sums = [torch.zeros(x.shape, device=host.device) for x in (k, v)]
    for rank in range(2):
        split = WindowSplit(None, 2, rank)
        own = split.positions(host.tokens // 2)
        both = SplitKernel(fused, split)
        q_, do_ = (x[:, own.to(host.device)] for x in (q, do))
        o, lse, saved = both.forward(q_, k, v, **call)
        dq, *rest = both.backward(do_, q_, k, v, o, lse, saved, **call)
        sums = [a + b for a, b in zip(sums, rest, strict=True)]
        found = (o, exact[0][:, own]), (lse, exact[1][..., own]), (dq, exact[2][:, own])
        for name, (value, expected) in zip(("o", "lse", "dq"), found, strict=True):
            close(name, value, expected)
    for name, value, expected in zip(("dk", "dv"), sums, exact[3:], strict=True):
        close(name, value, expected)


def test_backward_believes_the_lse_and_the_output_it_is_given(host):
    """What the algebra of gates rests on: weights above one, and any δ."""
    fused = kernel(host.backend)
    q, k, v, do = (x.to(host.device) for x in kernel_checks.case((1, 64, 4, 2, 72, 72), torch.bfloat16))
    call = {"scale": 0.1, "window": None}
    o, lse, saved = fused.forward(q, k, v, **call)
    plain = fused.backward(do, q, k, v, torch.zeros_like(o), lse, saved, **call)
    raised = fused.backward(do, q, k, v, torch.zeros_like(o), lse - 20.0, saved, **call)
    for one, other in zip(plain, raised, strict=True):
        torch.testing.assert_close(
            one.float() * torch.e**20, other.float(), rtol=5e-2, atol=BOUND * torch.e**20
        )


@pytest.mark.parametrize("D", [32, 64, 96, 128])
@pytest.mark.parametrize("settings", [{}, {"recent_window": 32}, {"sinks": 4}], ids=str)
def test_gated_attention_and_its_gates_gradient(host, D, settings):
    *tensors, do = gated_case(host, D)
    *_, dgate = compare(host, tensors, do, **settings)
    hidden = tensors[3] == 0
    assert dgate[hidden].abs().max() > 0, "dropped slots' gates have a gradient"


def test_gate_shared_by_all_heads(host):
    *tensors, do = gated_case(host, gate_heads=1)
    compare(host, tensors, do)


def test_rows_whose_every_earlier_slot_is_dropped(host):
    *tensors, do = gated_case(host)
    tensors[3] = torch.zeros_like(tensors[3])
    found = compare(host, tensors, do)
    value = tensors[2].repeat_interleave(4, 2)
    torch.testing.assert_close(found[0], value, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("gap", [60.0, 500.0])
def test_a_dropped_slot_far_above_the_visible_ones(host, gap):
    q, k, v, gate, do = gated_case(host)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, 1, :, 0], gate[:, 1] = gap, 0.0
    compare(host, [q, k, v, gate], do)


def test_what_a_dropped_slot_holds_reaches_no_other_row(host):
    *tensors, _ = gated_case(host)
    tensors[3][:, 5] = 0
    loud = [x.clone() for x in tensors]
    loud[2][:, 5] = 1e30
    before, after = (gated_attention(*x, scale=0.125, backend=host.backend) for x in (tensors, loud))
    same = torch.arange(host.tokens, device=host.device) != 5
    torch.testing.assert_close(before[:, same], after[:, same], rtol=0, atol=0)
    assert after[:, 5].abs().min() > 1e28


@pytest.mark.parametrize("settings", [{}, {"recent_window": 16}], ids=str)
def test_packed_documents(host, settings):
    *tensors, do = gated_case(host)
    bounds = torch.tensor([0, 33, 34, host.tokens], dtype=torch.int32, device=host.device)
    found = compare(host, tensors, do, cu_seqlens=bounds, **settings)
    alone = [x[:, 34:] for x in tensors]
    piece = gated_attention(*alone, scale=0.125, backend=host.backend, **settings)
    torch.testing.assert_close(found[0][:, 34:], piece, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("share", [0.5, 3], ids=["512 on a GPU", "3072 on a GPU"])
def test_packed_documents_of_other_lengths(host, share):
    """Transformer Engine up to 2.10 has statistics of more rows than tokens, except at a power of two from 1,024 on."""
    tokens = int(host.tokens * share)
    *tensors, do = gated_case(replace(host, tokens=tokens))
    bounds = torch.tensor([0, 33, 34, tokens], dtype=torch.int32, device=host.device)
    compare(host, tensors, do, cu_seqlens=bounds)


@pytest.mark.parametrize("cuts", [[0.5], [0.1, 0.3, 0.9]], ids=str)
def test_gates_behind_a_cut(host, cuts):
    *tensors, do = gated_case(host)
    spans = Spans.from_cuts([[int(cut * host.tokens) for cut in cuts]], host.tokens)
    found = gradients(span_gated_attention, tensors, do, backend=host.backend, spans=spans)
    exact = gradients(
        span_gated_attention_reference, [x.cpu().double() for x in tensors], do.cpu(), spans=spans
    )
    for name, value, expected in zip(("o", "dq", "dk", "dv", "dgate"), found, exact, strict=True):
        close(name, value, expected)


def test_plain_attention(host):
    q, k, v, _, do = gated_case(host)
    out = causal_attention(q, k, v, scale=0.125, backend=host.backend)
    expected = kernel_checks.reference(*(x.cpu() for x in (q, k, v, do)), scale=0.125)[0]
    torch.testing.assert_close(out.cpu().double(), expected, rtol=BOUND, atol=BOUND)


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
    *tensors, do = gated_case(Host(host.backend, host.device, tokens))
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


def test_memory_grows_with_the_tokens_not_with_their_square(host):
    sizes = (4096, 8192, 16384) if host.cuda else (256, 512, 1024)
    first, second, third = (peak(host, tokens) for tokens in sizes)
    assert second <= 2.2 * first and third <= 2.2 * second, (first, second, third)
    # One score matrix of one head in bf16 would be twice this.
    assert third < sizes[-1] ** 2 * (1 if not host.cuda else 8)


RAN = {  # compute capability → head dim → what Transformer Engine should run gates on, in its order of preference
    (8, 0): {64: ("flash2", "cudnn"), 128: ("flash2",)},
    (9, 0): {64: ("cudnn",), 128: ("cudnn",)},
    (10, 0): {64: ("cudnn",), 128: ("cudnn", "flash2")},
}


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_which_backend_ran(D):
    if not torch.cuda.is_available():
        pytest.skip(
            "no CUDA device: choices by architecture are asserted on the stand-in alone (te_cases.py)"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer_engine is not installed")
    capability = torch.cuda.get_device_capability()
    if capability not in RAN:
        pytest.skip(f"nothing is claimed of compute capability {capability}")
    *tensors, do = gated_case(HOSTS["te"], D)
    gradients(gated_attention, tensors, do, backend="te")
    assert kernel("te").last.name in RAN[capability][D]
