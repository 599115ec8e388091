"""Rank program of test_split_attention: python split_ranks.py FOLDER RANK WORLD_SIZE.

Attention over windows that are split between 2 and between 4 ranks, against the dense form of one process in float64:
output, and gradients to queries, keys, values and gates.
"""

import json
import sys
from pathlib import Path

import torch

# name → shape (B, chunk, H, G, D), gates, settings
CASES = {
    "GQA": ((2, 9, 4, 2, 8), {}, {}),
    "one gate for all heads": ((1, 9, 4, 2, 8), {"heads": 1}, {}),
    "soft gates": ((2, 7, 2, 2, 4), {"soft": True}, {}),
    "window": ((2, 9, 4, 2, 8), {}, {"recent_window": 4}),
    "window over chunks, sinks": ((2, 5, 4, 2, 8), {"soft": True}, {"recent_window": 8, "sinks": 2}),
    "window over everything": ((1, 3, 2, 1, 4), {}, {"recent_window": 99}),
    "sinks over chunks": ((1, 3, 2, 2, 4), {}, {"sinks": 5}),
    "one token a chunk": ((2, 1, 2, 2, 4), {}, {}),
    "nothing kept": ((1, 6, 2, 2, 4), {"none": True}, {}),
    "low cap": ((2, 9, 4, 2, 8), {}, {"gradient_cap": -1.0}),
    "dominant, cap 0": ((1, 9, 4, 2, 8), {"dominant": 40.0}, {"gradient_cap": 0.0}),
    "dominant beyond the numbers": ((1, 9, 4, 2, 8), {"dominant": 200.0}, {"gradient_cap": 3.0}),
    "dominant on one rank": ((1, 9, 4, 2, 8), {"dominant": 200.0, "rows": 3}, {"gradient_cap": 3.0}),
}


def inputs(shape, ranks, dtype, heads=None, soft=False, none=False, dominant=0.0, rows=None):
    """q, k, v, gate, do of whole windows. dominant: logits by which a dropped slot exceeds the others, for all rows or for
    those before `rows`."""
    B, chunk, H, G, D = shape
    T = 2 * ranks * chunk
    rng = torch.Generator().manual_seed(7)
    q, k, v, do = (torch.randn(B, T, n, D, generator=rng, dtype=torch.float64) for n in (H, G, G, H))
    gate = torch.rand(B, T, heads or G, generator=rng, dtype=torch.float64)
    gate = torch.where(gate < 0.3, 0.0, torch.where(gate > 0.7, 1.0, gate)) if soft else gate.round()
    if none:
        gate = torch.zeros_like(gate)
    if dominant:
        q[..., 0] = 8.0
        q[:, rows:, :, 0] *= 1 if rows is None else 0
        k[..., 0] = 0.0
        gate[:, 1], k[:, 1, :, 0] = 0.0, dominant * D**0.5 / 8
    wide = torch.promote_types(dtype, torch.float32)
    return *(x.to(dtype) for x in (q, k, v)), gate.to(wide), do.to(dtype)


def run(function, tensors, do, **settings):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, scale=tensors[0].shape[-1] ** -0.5, **settings)
    return [out.detach(), *torch.autograd.grad((out * do.to(out.dtype)).sum(), leaves)]


def main(folder, rank, world_size):
    from kvcat_nemo.kernels import WindowSplit, causal_attention, gated_attention
    from kvcat_nemo.kernels.fused.cpu import CpuKernel
    from kvcat_nemo.method.attention import gated_attention_reference

    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    pairs = [torch.distributed.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    errors = {}

    def compare(name, ours, expected, split):
        errors[name] = [
            float((a.double() - split.own(b)).norm() / b.norm().clamp(min=1.0))
            if a.isfinite().all()
            else 1e300
            for a, b in zip(ours, expected, strict=True)
        ]

    for group in (pairs[rank // 2], torch.distributed.group.WORLD):
        split = WindowSplit.over(group)
        for name, (shape, gates, settings) in CASES.items():
            for form, dtype in (
                ("cpu", torch.float64),
                ("columns", torch.float64),
                ("oracle", torch.float64),
                ("cpu", torch.float32),
                ("cpu", torch.bfloat16),
            ):
                *tensors, do = inputs(shape, split.ranks, dtype, **gates)
                wide = [x.double() for x in tensors]
                expected = run(gated_attention_reference, wide, do.double(), **settings)
                CpuKernel.takes_key_bias = form != "columns"
                backend = "oracle" if form == "oracle" else "cpu"
                own, own_do = [split.own(x) for x in tensors], split.own(do)
                ours = run(gated_attention, own, own_do, split=split, backend=backend, **settings)
                title = f"{split.ranks} ranks, {name}, {form}, {dtype}"
                compare(title, ours, expected, split)
                if not settings:
                    open_gates = torch.ones_like(wide[3])
                    dense = run(lambda q, k, v, g=open_gates, **s: gated_attention_reference(q, k, v, g, **s),
                                wide[:3], do.double())  # fmt: skip
                    ours = run(causal_attention, own[:3], own_do, split=split, backend=backend)
                    compare(f"{title}, dense", ours, dense, split)
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    from tests.kernels.nan_memory import nan_memory

    with nan_memory():
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
