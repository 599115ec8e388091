"""By how much more than the plain kernel's may gated attention's results be rounded? Derived, for any processor.

A sum of terms t_1 … t_n that are each rounded is wrong by c·u·|Σ|t_i|| where u is the unit roundoff; the constant c depends
on n, on blocking, on fused multiply-add, on the exponential: on the processor, that is. The plain kernel computes the
same kinds of sums (over slots, over queries, over the head's width) on the same q, k and v, so that its own error
measures c·u on the machine at hand:

    error(x) ≤ unit·κ(x),    κ(x) = ‖Σ|terms of x|‖ / ‖x‖,    unit = error(plain) / κ(plain)

Gated attention does two such sums, over the earlier slots and over the near ones, and adds them: twice the unit.

One thing is its own. A gate is a bias β = log g in the exponent, |β| up to some thirty here, and rounding of it is relative
error of a weight: β itself, its sum with the logit, and that sum less the row's level are each rounded by at most u·|β|
more than without it, which changes a weight P_ij, and whatever term holds it, by 3·u·|β_j| of itself. In the gates'
gradients nothing makes these terms small: dS_ij/g_j has lost the factor g_j. Hence

    error(x) ≤ 2·unit·κ(x) + 3·u·‖Σ|β·term of x|‖/‖x‖

With gates between 0 and 1 and in float64, the last term is most of the gates' bound: 2.8 times the plain kernel's error
was measured there on one processor and 1.8 on another, of some 15 that it allows.
"""

from __future__ import annotations

import math

import torch

from kvcat_nemo.method.attention import GATE_GRADIENT_CAP, _sees, always_visible

SUMS = 2
"""Earlier slots, near slots."""
BIAS_ROUNDINGS = 3


def unit_roundoff(dtype: torch.dtype) -> float:
    """Of the bias: 16-bit types carry it as two numbers (kernels/attention/gated_function.py), hence with the square of theirs."""
    u = torch.finfo(dtype).eps / 2
    return u * u if torch.finfo(dtype).bits == 16 else u


def sums(
    q, k, v, gate, do, *, scale, sinks=0, recent_window=1, gradient_cap=GATE_GRADIENT_CAP, cu_seqlens=None
):
    """Name → (κ, Σ|β·term| over the result's norm) of o, dq, dk, dv and dgate, from the dense float64 formula.

    Letters: i query, j slot, N query heads of a KV head; see method.attention.
    """
    q, k, v, gate, do = (x.detach().double() for x in (q, k, v, gate, do))
    B, T, H, D = q.shape
    G = k.shape[2]
    N = H // G
    split = lambda x: x.view(B, T, G, N, D).permute(0, 2, 3, 1, 4)  # noqa: E731  [B, G, N, T, D]
    q, do = split(q), split(do)
    k, v = (x.permute(0, 2, 1, 3)[:, :, None] for x in (k, v))
    sees = _sees(T, None, cu_seqlens)
    free = always_visible(T, sinks, recent_window, None, cu_seqlens)
    shared = gate.shape[2] == 1 and G > 1
    column = gate.expand(B, T, G).permute(0, 2, 1)[:, :, None, None]  # [B, G, 1, 1, T]
    g = torch.where(free, torch.ones_like(column), column) * sees
    s = (q @ k.transpose(-1, -2)) * scale
    level = (s + g.log()).logsumexp(-1, keepdim=True)
    P = g * (s - level).exp().masked_fill(~sees, 0).masked_fill(g == 0, 0)
    beta = torch.where((g > 0) & ~free, g.clamp(min=1e-300).log().abs(), torch.zeros_like(g))
    o = P @ v
    inner = do @ v.transpose(-1, -2) - (do * o).sum(-1, keepdim=True)
    inner_abs = do.abs() @ v.abs().transpose(-1, -2) + (do * o).abs().sum(-1, keepdim=True)
    dS, dS_abs = P * inner, P * inner_abs
    gap = (s - level).masked_fill(~(sees & ~free), -math.inf)  # the gates' weights, without the gates
    excess = (gap.logsumexp((2, 3), keepdim=True) - math.log(N) - gradient_cap).clamp(min=0)
    W = torch.where(g > 0, gap, gap - excess).exp()

    def over_queries(term, x):
        return (term.transpose(-1, -2) @ x).sum(2)

    def gates(term):
        out = term.sum((2, 3))
        return out.sum(1) if shared else out

    def condition(value, absolute, biased):
        size = value.norm().clamp(min=1e-300)
        return float(absolute.norm() / size), float(biased.norm() / size)

    PB, SB = P * beta, dS.abs() * beta
    return {
        "o": condition(o, P @ v.abs(), PB @ v.abs()),
        "dq": condition(dS @ k, dS_abs @ k.abs(), SB @ k.abs()),
        "dk": condition(over_queries(dS, q), over_queries(dS_abs, q.abs()), over_queries(SB, q.abs())),
        "dv": condition(over_queries(P, do), over_queries(P, do.abs()), over_queries(PB, do.abs())),
        "dgate": condition(gates(W * inner), gates(W * inner_abs), gates(W * inner.abs() * beta)),
    }


def allowed(
    tensors, do, plain: list[float], dtype: torch.dtype, *, plain_settings: dict, **settings
) -> dict[str, float]:
    """Largest relative error (in norm) of o, dq, dk, dv and dgate.

    Args:
        tensors: q, k, v, gate, in the type that was computed in; plain: the plain kernel's errors of o, dq, dk and dv on the
            same q, k and v; settings: of gated attention, plain_settings: of the plain call.
    """
    settings.setdefault("scale", tensors[0].shape[-1] ** -0.5)
    plain_settings = {"scale": settings["scale"]} | plain_settings
    ours = sums(*tensors, do, **settings)
    open_gates = torch.ones_like(tensors[3][..., :1])
    theirs = sums(*tensors[:3], open_gates, do, **plain_settings)
    # A result is rounded once itself whatever its terms: where gates make its sum better conditioned, that does not shrink.
    ratio = {name: max(ours[name][0] / theirs[name][0], 1.0) for name in ("o", "dq", "dk", "dv")}
    from_sums = {name: error * ratio[name] for name, error in zip(ratio, plain, strict=True)}
    # The plain kernel has no gates. Theirs are sums of dS over queries, as dk is, and dq over slots.
    units = {name: error / theirs[name][0] for name, error in zip(ratio, plain, strict=True)}
    from_sums["dgate"] = max(max(units["dq"], units["dk"]) * ours["dgate"][0], max(plain))
    u = unit_roundoff(dtype)
    return {name: SUMS * from_sums[name] + BIAS_ROUNDINGS * u * biased for name, (_, biased) in ours.items()}
