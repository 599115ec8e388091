"""Rank program of test_sequence_router: python router_ranks.py FOLDER RANK WORLD_SIZE.

A router whose hidden states are split over four ranks by sequence parallelism, context parallelism and both, with one
document and several in a window, against the router of the whole window.
"""

import json
import sys
from pathlib import Path

import torch

B, T, M = 2, 24, 6


def main(folder, rank, world_size):
    from kvcat_nemo.engine.collectives import window_mean
    from kvcat_nemo.engine.segments import TokenSegments
    from kvcat_nemo.method.config import KVCatConfig
    from kvcat_nemo.method.losses import budget_loss, budget_of_means
    from kvcat_nemo.method.router import Router

    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    new = torch.distributed.new_group
    rows = [new([0, 1]), new([2, 3])]
    columns = [new([0, 2]), new([1, 3])]
    one = [new([r]) for r in range(world_size)][rank]
    everyone = torch.distributed.group.WORLD
    layouts = {  # tensor-parallel group, context-parallel group, both, sequence-parallel
        "SP4": (everyone, one, everyone, True),
        "CP4": (one, everyone, everyone, False),
        "SP2 CP2": (rows[rank // 2], columns[rank % 2], everyone, True),
        "TP2 CP2": (rows[rank // 2], columns[rank % 2], everyone, False),
        "SP2": (rows[rank // 2], one, rows[rank // 2], True),
        "TP4": (everyone, one, everyone, False),
    }
    router = Router(M, KVCatConfig(router_dim=4), 0).double()
    for parameter in router.parameters():
        rng = torch.Generator().manual_seed(parameter.numel())
        parameter.data = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    h = torch.randn(B, T, M, generator=rng, dtype=torch.float64)
    weight = torch.randn(B, T, generator=rng, dtype=torch.float64)
    lengths = [[5, 1, 9, 9], [6, 6, 12]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])

    def run(h, weight, budget, *where):
        h = h.detach().clone().requires_grad_()
        routing = router(h, *where)
        loss = (routing.gate_BT * weight).sum() + budget(routing)
        grads = torch.autograd.grad(loss, [h, *router.parameters()])
        return routing, grads

    results = {}
    for name, (tp, cp, both, sequence_parallel) in layouts.items():
        for position in (None, positions):
            tokens = T // (cp.size() * (tp.size() if sequence_parallel else 1))
            whole, (dh, *dw) = run(
                h, weight, lambda r: 3 * budget_loss(r.p_BT, r.hard_BT, 0.4), None, position
            )
            segments = TokenSegments.of_hidden_states(tokens, tp, cp, both, sequence_parallel, position)
            if segments is None:
                assert name == "TP4"
                results[f"{name} {position is None}"] = {"flipped gates": 0, "smallest scale": 1.0, "": 0.0}
                continue
            own = segments.own
            group = segments.group

            def budget(r, group=group):
                means = (window_mean(x, group) for x in (r.hard_BT, r.p_BT))
                return 3 * budget_of_means(*means, 0.4)

            ours, (dh_, *dw_) = run(
                own(h), own(weight), budget, segments, None if position is None else own(position)
            )
            errors = {
                "flipped gates": float((ours.hard_BT != own(whole.hard_BT)).sum()),
                "p": float((ours.p_BT - own(whole.p_BT)).abs().max()),
                "h": float((dh_ - own(dh)).abs().max() / dh.abs().max()),
                "smallest scale": min(float(x.abs().max()) for x in (dh, *dw)),
            }
            for (parameter, _), a, b in zip(router.named_parameters(), dw_, dw, strict=True):
                a = a.clone()
                torch.distributed.all_reduce(a, group=group)
                errors[parameter] = float((a - b).abs().max() / b.abs().max())
            results[f"{name} {position is None}"] = errors
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
