"""Cases of kernels/attention/columns_triton.py, run by test_columns.py in .venv-te, where Triton interprets its kernels on the CPU."""

import random

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import GridExecutor

from kvcat_nemo.kernels import gated_attention
from kvcat_nemo.kernels.attention import columns, columns_triton, gated_function
from kvcat_nemo.kernels.fused.cpu import CpuKernel
from kvcat_nemo.method.attention import gated_attention_reference
from tests.kernels.launches import attention_launches
from tests.kernels.test_gated import case, run

FUNCTIONS = ("query", "slots", "gradient", "sums", "gate", "merge", "own", "own and gated")
ROUNDINGS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


def results(form, x, window, widths, terms, scale, shift, cap):
    """Every function of a form of the columns, on the same tensors."""
    wide = form.slot_columns(
        x["k"], x["v"], x["gate"], x["position"], window=window, widths=widths, terms=terms, scale=scale, shift=shift
    )  # fmt: skip
    N = x["q"].shape[2] // x["k"].shape[2]
    wide_do, delta = form.gradient_columns(x["do"], x["o"], widths[1], terms)
    far = x["far"]
    sums = form.gate_sums(
        far[1], far[2], x["v"], x["gate"], window=window, D=x["k"].shape[-1], terms=terms, scale=scale
    )
    merged = form.merge_own(x["q"], x["k"], x["v"], x["o"], x["lse"], scale)
    own = (x["do"], delta, x["q"], x["k"], x["v"], *merged[1:], scale)
    return {
        "query": [form.query_columns(x["q"], widths[0], terms)],
        "slots": wide,
        "gradient": [wide_do, delta],
        "sums": [sums],
        "gate": [form.gate_gradient(sums, wide[2], x["gate"], x["sink"], cap, N)],
        "merge": merged,
        "own": form.own_gradients(*own),
        "own and gated": form.own_and_gated_gradients(*own, far, x["gate"]),
    }


@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_each_function_is_its_namesake(dtype, seed):
    """Float64: to rounding. Narrower types: to the rounding of each of the plain form's steps."""
    draw = random.Random(seed)
    B, T, G, N = draw.randint(1, 2), draw.randint(2, 6), draw.randint(1, 2), draw.randint(1, 3)
    D, E, padding, sinks = draw.randint(1, 9), draw.randint(1, 9), draw.randint(0, 3), draw.randint(0, 2)
    window = draw.randint(1, min(3, T))
    shift = (0.0, columns.HIDDEN, "by slot")[seed % 3]
    terms = 1 + seed % 2 if dtype.itemsize >= 4 else 2  # a wide number's second column is 0
    widths = (D + terms + padding, E + terms + 1 + padding)
    rng = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def numbers(heads, width, dtype=dtype):
        # Heads before tokens in memory: no tensor here is contiguous.
        x = torch.randn(B, heads, T, width, generator=rng, dtype=torch.float64)
        return x.to(dtype).transpose(1, 2)

    gate = torch.rand(B, G, T, generator=rng, dtype=torch.float64).to(wide).transpose(1, 2)
    gate = torch.where(gate < 0.4, 0.0, torch.where(gate > 0.8, 1.0, gate))
    place = torch.arange(T)
    begin = draw.randint(0, T)
    position = torch.where(place < begin, place, place - begin)  # two documents
    x = {
        "q": numbers(G * N, D),
        "k": numbers(G, D),
        "v": numbers(G, E),
        "do": numbers(G * N, E),
        "o": numbers(G * N, E),
        "lse": numbers(G * N, 1, wide)[..., 0],
        "gate": gate,
        "position": position,
        "sink": (position < sinks)[None],
        "far": (numbers(G * N, widths[0]), numbers(G, widths[0]), numbers(G, widths[1])),
    }
    x["far"][2][..., E + terms].abs_()  # a slot's weight in all rows
    if shift == "by slot":
        shift = 10 * torch.rand(B, T, G, generator=rng).to(wide)
    options = (x, window, widths, terms, D**-0.5, shift, 0.0)
    ours, theirs = results(columns_triton, *options), results(columns, *options)
    # A hidden slot's β has its own size: no other number may be measured by it.
    beta, minus_delta = slice(D, D + terms), slice(E, E + terms)
    for form in (ours, theirs):
        form["β"] = [form["slots"][0][..., beta].double().sum(-1)]
        form["−δ"] = [form["gradient"][0][..., minus_delta].double().sum(-1)]
        form["slots"] = [without(form["slots"][0], beta), *form["slots"][1:]]
        form["gradient"] = [without(form["gradient"][0], minus_delta), *form["gradient"][1:]]
    columns_hold = 2.0**-14 if dtype == torch.bfloat16 else 0.0
    for name in ours:
        for a, b in zip(ours[name], theirs[name], strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype, name
            # Wide results of bf16 tensors hang on what two columns hold.
            rounding = ROUNDINGS[dtype] if a.dtype == dtype else max(ROUNDINGS[wide], columns_hold)
            # The plain form rounds each head's product and each sum to dtype: N + 4 steps at most.
            bound, size = (N + 4) * rounding, ordinary(b)
            torch.testing.assert_close(
                a.double(), b.double(), rtol=bound, atol=bound * size, msg=lambda m, n=name: f"{n}: {m}"
            )  # fmt: skip


def without(x, columns):
    return torch.cat([x[..., : columns.start], x[..., columns.stop :]], -1)


def ordinary(x):
    """The largest size of numbers that are no hidden slot's, and 1 at least."""
    sizes = x.double().abs().flatten().tolist()
    return max([1.0, *(size for size in sizes if size < 1000)])


@pytest.mark.parametrize("shift", [0.0, columns.HIDDEN, "by slot"])
@pytest.mark.parametrize("form", [columns, columns_triton], ids=["plain", "triton"])
def test_two_columns_hold_one_number(form, shift):
    """β/scale and −δ of bf16 tensors, against float64: one bf16 column would be off by up to 2⁻⁸ of the number."""
    B, T, G, D, window, scale = 2, 8, 2, 5, 2, 5**-0.5
    rng = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, B, T, G, D, generator=rng).bfloat16()
    do, o = torch.randn(2, B, T, G, D, generator=rng).bfloat16()
    drawn = torch.rand(B, T, G, generator=rng)
    gate = torch.where(drawn < 0.3, 0.0, 0.97 * drawn)
    if shift == "by slot":
        shift = 1 + 10 * torch.rand(B, T, G, generator=rng)
    wide_k, _, held = form.slot_columns(
        k, v, gate, torch.arange(T), window=window, widths=(8, 8), terms=2, scale=scale, shift=shift
    )
    exact = torch.full((B, T, G), -columns.HIDDEN, dtype=torch.float64)
    lower = torch.as_tensor(shift).double().expand(B, T, G)
    exact[:, window:] = torch.where(gate > 0, gate.double().log(), -lower)[:, :-window]
    wide_do, delta = form.gradient_columns(do, o, 8, 2)
    exact_delta = (do.double() * o.double()).sum(-1)
    for pair, number in ((wide_k[..., D : D + 2], exact / scale), (wide_do[..., D : D + 2], -exact_delta)):
        high, low = pair.double().unbind(-1)
        # bf16 rounds to 2⁻⁸ of a number, and the second column what was lost once more. Triton's interpreter cuts off.
        rounding = 2**-8 if form is columns else 2**-7
        torch.testing.assert_close(high, number, rtol=rounding + 2**-20, atol=2**-20)
        torch.testing.assert_close(high + low, number, rtol=rounding**2 + 2**-20, atol=2**-20)
        assert ((low != 0) | (number == 0)).double().mean() > 0.9
    torch.testing.assert_close(held, exact[:, window:], rtol=rounding**2 + 2**-20, atol=2**-20)
    torch.testing.assert_close(delta.double(), exact_delta, rtol=2**-20, atol=2**-20)


SETTINGS = [
    {"sinks": 2},
    {"recent_window": 3, "gradient_cap": 0.0},
    {"cu_seqlens": torch.tensor([0, 4, 5, 5, 11], dtype=torch.int32), "sinks": 1},
]


@pytest.mark.parametrize("gate", ["mixed", "hard"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_gated_attention_with_these_columns(monkeypatch, gate, options):
    """Against the float64 oracle, through the path that Transformer Engine's and flash-attn's kernels take."""
    monkeypatch.setattr(CpuKernel, "takes_key_bias", False)
    monkeypatch.setattr(gated_function, "columns_for", lambda device: columns_triton)
    *tensors, do = case(1, 11, 4, 2, 8, gate=gate)
    ours = run(gated_attention, tensors, do, **options)
    expected = run(gated_attention_reference, tensors, do, wide=True, **options)
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(
            value, other, rtol=1e-9, atol=1e-11 * float(other.abs().max().clamp(min=1))
        )


def test_weights_beyond_the_headroom(monkeypatch):
    """The second backward, in which every dropped slot has a shift of its own."""
    monkeypatch.setattr(CpuKernel, "takes_key_bias", False)
    monkeypatch.setattr(gated_function, "columns_for", lambda device: columns_triton)
    *tensors, do = case(1, 11, 4, 2, 8, spread=6.0)
    ours = run(gated_attention, tensors, do)
    expected = run(gated_attention_reference, tensors, do, wide=True)
    for value, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(
            value, other, rtol=1e-8, atol=1e-10 * float(other.abs().max().clamp(min=1))
        )


def test_the_small_case_that_a_run_tries_first():
    assert columns_triton.failure(torch.device("cpu")) == ""


def wrong(name, change):
    """A function whose results are changed: (its name, itself)."""
    real = getattr(columns, name)

    def changed(*args, **options):
        results = real(*args, **options)
        change(results)
        return results

    return name, changed


D = 16
"""Width of keys in the small case."""
WRONG = {
    "query columns": wrong("query_columns", lambda q: q.neg_()),
    "keys": wrong("slot_columns", lambda x: x[0][..., :D].zero_()),
    "one key": wrong("slot_columns", lambda x: x[0][0, -1, 0, 3].zero_()),
    "padding of keys": wrong("slot_columns", lambda x: x[0][..., D + 2 :].fill_(1)),
    "β": wrong("slot_columns", lambda x: x[0][..., D].zero_()),
    "what rounding β lost": wrong("slot_columns", lambda x: x[0][..., D + 1].zero_()),
    "values": wrong("slot_columns", lambda x: x[1][0, -1, 0, 0].add_(1)),
    "held β": wrong("slot_columns", lambda x: x[2].mul_(1.01)),
    "−δ": wrong("gradient_columns", lambda x: x[0][..., D].neg_()),
    "what rounding δ lost": wrong("gradient_columns", lambda x: x[0][..., D + 1].zero_()),
    "δ": wrong("gradient_columns", lambda x: x[1].mul_(1.01)),
    "sums": wrong("gate_sums", lambda x: x[..., 0].mul_(1.01)),
    "gate gradient": wrong("gate_gradient", lambda x: x.mul_(1.01)),
    "merged": wrong("merge_own", lambda x: x[0].mul_(1.1)),
    "merged_lse": wrong("merge_own", lambda x: x[1].add_(0.01)),
    "own gradients": wrong("own_gradients", lambda x: x[2].mul_(1.1)),
    "own and gated gradients": wrong("own_and_gated_gradients", lambda x: x[1].mul_(1.1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_kernel_is_found(monkeypatch, case):
    for name, _ in WRONG.values():  # the right ones by the plain form, which is fast here
        monkeypatch.setattr(columns_triton, name, getattr(columns, name))
    assert columns_triton.failure.__wrapped__(torch.device("cpu")) == ""
    monkeypatch.setattr(columns_triton, *WRONG[case])
    found = columns_triton.failure.__wrapped__(torch.device("cpu"))
    assert "differs from the plain form" in found or "hold another number" in found


def test_a_kernel_that_cannot_be_launched_is_found(monkeypatch):
    def fails(*args):
        raise RuntimeError("no image for this device\nsecond line")

    monkeypatch.setattr(columns_triton, "own_gradients", fails)
    found = columns_triton.failure.__wrapped__(torch.device("cpu"))
    assert found == "RuntimeError: no image for this device"


@pytest.mark.parametrize(
    "options,forward,backward",
    [
        ({}, (3, 3), (6, 14)),  # two of them begin the watch, once per process
        ({"recent_window": 3}, (2, 11), (5, 18)),
        ({"cu_seqlens": torch.tensor([0, 4, 11])}, (3, 10), (6, 19)),
    ],
    ids=["own slot", "window", "packed"],
)  # fmt: skip
def test_launches(monkeypatch, options, forward, backward):
    """(Triton kernels, other operations) at most, in bf16. Raise the numbers knowingly."""
    monkeypatch.setattr(gated_function, "columns_for", lambda device: columns_triton)
    launched = []
    real = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launched.append(self.fn.__name__)
        with _disable_current_modes():
            return real(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    seen = attention_launches(**options)
    first = {"_query_columns": 1, "_slot_columns": 1, "_merge_own": 1}
    in_forward = len(first) if "recent_window" not in options else 2
    assert in_forward <= forward[0] and len(launched) - in_forward <= backward[0], launched
    others = len(seen.forward), len(seen.backward)
    assert others[0] <= forward[1] and others[1] <= backward[1], (seen.forward.names, seen.backward.names)
