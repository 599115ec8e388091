"""Rank program of test_token_loss_split: python token_loss_ranks.py FOLDER RANK WORLD_SIZE [KERNEL].

Runs the losses over a vocabulary split between 2 and between 4 ranks, and compares metrics and gradients with those of
one process. KERNEL "unequal": `auto`, where Triton serves the CPU in all processes but rank 1.
"""

import json
import sys
from itertools import product
from pathlib import Path

import torch

T, B, V, PADDED, M = 8, 2, 13, 24, 5  # of 4 ranks the third has five rows of padding, the last nothing else


def main(folder, rank, world_size, kernel="auto"):
    from kvcat_nemo.kernels.losses.token_loss import token_losses

    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    pairs = [torch.distributed.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    groups = {2: pairs[rank // 2], 4: torch.distributed.group.WORLD}
    few, unequal = kernel in ("triton", "unequal"), kernel == "unequal"
    if unequal:
        check_choice(rank, groups)
        kernel = "auto"
    errors = {}
    for ranks, sequence_parallel, known, paired, (temperature, share), dtype in product(
        (2, 4),
        (False, True),
        (False, True),
        (False, True),
        ((1.0, 1.0), (3.0, 1.0), (1.0, 0.6), (3.0, 0.0)),
        (torch.float64, torch.float32),
    ):
        if not paired and (temperature, share) != (1, 1):
            continue
        if few and (known != sequence_parallel or dtype == torch.float32):
            continue  # a fifth of the cases: Triton's interpreter is slow
        if unequal and (not paired or temperature != 1 or share != 1):
            continue
        rng = torch.Generator().manual_seed(ranks)
        passes = 1 + paired
        hidden = torch.randn(T, passes * B, M, generator=rng, dtype=torch.float64).to(dtype)
        weight = torch.randn(PADDED, M, generator=rng, dtype=torch.float64).to(dtype)
        weight[V:] *= 50  # padding that leaks is seen
        labels = torch.randint(0, V, (B, T), generator=rng)
        weights = torch.rand(passes, B, T, generator=rng, dtype=torch.float64)
        options = dict(vocab_size=V, paired=paired, temperature=temperature, memory_mib=0.001)
        options |= {"loss_weights": weights if known else None, "forward_share": share}

        def run(h, w, labels=labels, weights=weights, passes=passes, options=options, **split):
            h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
            out = token_losses(h, w, labels, **options, **split)
            grads = torch.autograd.grad((out[:passes] * weights.to(out.dtype)).sum(), (h, w))
            return out.detach(), *grads

        whole = run(hidden.double(), weight.double())
        group = groups[ranks]
        part = slice(group.rank() * PADDED // ranks, (group.rank() + 1) * PADDED // ranks)
        own = (
            slice(group.rank() * T // ranks, (group.rank() + 1) * T // ranks)
            if sequence_parallel
            else slice(T)
        )
        split = run(
            hidden[own], weight[part], group=group, sequence_parallel=sequence_parallel, kernel=kernel
        )
        expected = whole[0], whole[1][own], whole[2][part]
        name = f"TP{ranks} sp={sequence_parallel} known={known} paired={paired} τ={temperature} λ={share} {dtype}"
        errors[name] = [
            float((a.double() - b).norm() / whole[i].norm())
            for i, (a, b) in enumerate(zip(split, expected, strict=True))
        ]
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


def check_choice(rank, groups):
    """Rank 1 cannot use Triton: neither can those that share a vocabulary with rank 1, and the others can."""
    from kvcat_nemo.kernels.losses import row_losses_triton, token_loss

    token_loss.AUTO_DEVICES = {"cpu"}
    row_losses_triton.failure = lambda device: "no image for this device" if rank == 1 else ""
    cpu = torch.device("cpu")
    for ranks, expected in ((2, "torch" if rank < 2 else "triton"), (4, "torch")):
        for _ in range(2):
            assert token_loss.select_loss_kernel("auto", cpu, groups[ranks]) == expected
    alone = token_loss.select_loss_kernel("auto", cpu)
    assert alone == ("torch" if rank == 1 else "triton")
    try:
        token_loss.select_loss_kernel("triton", cpu, groups[4])
    except ValueError as error:
        assert ("no image" if rank == 1 else "another process") in str(error)
    else:
        raise AssertionError("loss_kernel=triton was taken")


if __name__ == "__main__":
    from tests.kernels.nan_memory import nan_memory

    with nan_memory():
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
