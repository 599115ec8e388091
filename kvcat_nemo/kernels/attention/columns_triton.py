"""kernels/attention/columns.py as Triton kernels: one launch where PyTorch takes ten, and each tensor is read and written once.

The functions take the arguments of their namesakes there and return the same; numbers in 16-bit types are computed in float32
and rounded once.
"""

from __future__ import annotations

import functools
import sys

import torch

from kvcat_nemo.kernels.attention import columns as plain
from kvcat_nemo.kernels.attention.columns import HIDDEN
from kvcat_nemo.kernels.attention.columns_backward_triton import (
    gate_gradient,
    gate_sums,
    gradient_columns,
)
from kvcat_nemo.kernels.attention.columns_forward_triton import query_columns, slot_columns
from kvcat_nemo.kernels.attention.own_slot_triton import merge_own, own_and_gated_gradients, own_gradients

__all__ = [
    "failure",
    "gate_gradient",
    "gate_sums",
    "gradient_columns",
    "merge_own",
    "own_and_gated_gradients",
    "own_gradients",
    "query_columns",
    "slot_columns",
]


@functools.cache
def failure(device: torch.device) -> str:
    """Why these kernels cannot be used on a device; empty when a small case gives the plain form's figures there.

    No GPU has run these kernels in this project's tests: a run looks for itself before it trusts them.
    """
    B, T, G, N, D, width, scale = 2, 9, 2, 2, 16, 24, 0.25
    rng = torch.Generator().manual_seed(0)

    def numbers(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    q, do, o = (numbers(B, T, G * N, D) for _ in range(3))
    k, v = (numbers(B, T, G, D) for _ in range(2))
    drawn = torch.rand(B, T, G, generator=rng)
    gate = torch.where(drawn < 0.3, 0.0, drawn).to(device)
    shift = 10 * torch.rand(B, T, G, generator=rng).to(device)
    position = torch.arange(T, device=device)
    lse = numbers(B, T, G * N, dtype=torch.float32)
    past_grads = numbers(B, T, G * N, width), numbers(B, T, G, width), numbers(B, T, G, width)
    past_grads[2][..., D + 2].abs_()  # a slot's weight in all rows
    sink = position[None] < 1

    def slots(form, k, v, gate, window, shift, terms=2):
        settings = {"window": window, "widths": (width, width), "terms": terms, "scale": scale}
        return form.slot_columns(k, v, gate, position, shift=shift, **settings)

    def run(form):
        out, columns = {"query columns": form.query_columns(q, width, 2)}, {}
        for name, window, by in (("slots", 1, 0.0), ("slots with a shift each", 2, shift)):
            keys, out[f"{name}, values"], out[f"{name}, held"] = slots(form, k, v, gate, window, by)
            out[f"{name}, keys"] = torch.cat([keys[..., :D], keys[..., D + 2 :]], -1)
            columns[f"{name}, β"] = keys[..., D : D + 2]
        wide_do, out["δ"] = form.gradient_columns(do, o, width, 2)
        out["output gradients"] = torch.cat([wide_do[..., :D], wide_do[..., D + 2 :]], -1)
        columns["−δ"] = wide_do[..., D : D + 2]
        sums = out["sums"] = form.gate_sums(*past_grads[1:], v, gate, window=1, D=D, terms=2, scale=scale)
        out["gate gradient"] = form.gate_gradient(sums, out["slots, held"], gate, sink, 3.0, N)
        merged = form.merge_own(q, k, v, o.float(), lse, scale)
        own = do, out["δ"], q, k, v, *merged[1:], scale
        results = {
            "merged": merged,
            "own": form.own_gradients(*own),
            "own and gated": form.own_and_gated_gradients(*own, past_grads, gate),
        }
        out |= {f"{name} {i}": x for name, several in results.items() for i, x in enumerate(several)}
        return out, columns

    try:
        ours, columns = run(sys.modules[__name__])
        theirs = run(plain)[0]
    except Exception as error:  # a compiler, a driver or a launch: whatever it is, the plain form is there
        return f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}"
    for name, b in theirs.items():
        a, b = ours[name].double(), b.double()
        # bf16 results are rounded at different places: a few units of the last place, 2⁻⁸. Wide ones hang on β in two
        # columns, to 2⁻¹⁴ or better.
        rounding = 2**-6 if theirs[name].dtype == torch.bfloat16 else 2**-11
        # Places without a slot hold −HIDDEN, beside which no figure of a slot would count.
        size = float(b[b.abs() < HIDDEN / 2].abs().max())
        if not torch.allclose(a, b, rtol=rounding, atol=rounding * size):
            return f"{name}: differs from the plain form by {float((a - b).abs().max()):.3g}"
    wide = k.double(), v.double(), gate.double()
    exact = {
        "slots, β": slots(plain, *wide, 1, 0.0, 1)[0][..., D],
        "slots with a shift each, β": slots(plain, *wide, 2, shift.double(), 1)[0][..., D],
        "−δ": -plain.gradient_columns(do.double(), o.double(), width, 1)[1],
    }
    for name, b in exact.items():
        # One bf16 column is off by up to 2⁻⁸ of the number, two by 2⁻¹⁶, or by 2⁻¹⁴ where they are cut off and not
        # rounded, as by Triton's interpreter. float32 logarithms and sums of 16 products are good to 2⁻²⁰.
        off = (columns[name].double().sum(-1) - b).abs()
        if not bool((off <= 2**-14 * b.abs() + 2**-18).all()):
            return f"{name}: two columns hold another number, by {float(off.max()):.3g}"
    return ""
