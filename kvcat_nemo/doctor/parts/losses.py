"""CE and KL from hidden states, by PyTorch's operations and by Triton's kernels."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import torch

from kvcat_nemo.doctor.parts.host import Differs, Host
from kvcat_nemo.doctor.report import Check, Skip, checked


def checks(host: Host) -> Iterator[Check]:
    """CE and KL from hidden states in bf16, and their gradients, against the method's functions in float64.

    By PyTorch's operations and by Triton's kernels; and which of them, and of the forms of attention's columns, runs take here.
    """
    yield checked("forms that runs take", functools.partial(_chosen_forms, host))
    for name in TRITON:
        yield checked(name, functools.partial(_triton_works, host, name))
    for kernel in ("torch", "triton"):
        for name, settings in {
            "paired": {},
            "paired, one sweep": {"known": True},
            "paired, temperature 2": {"temperature": 2.0},
            "plain": {"paired": False},
        }.items():
            yield checked(f"{kernel}: {name}", functools.partial(_loss_case, host, kernel, **settings))


def _chosen_forms(host: Host) -> dict[str, str]:
    from kvcat_nemo.kernels.attention.columns_choice import columns_for
    from kvcat_nemo.kernels.losses.token_loss import select_loss_kernel

    device = torch.device(host.device)
    columns = columns_for(device).__name__.rpartition(".")[2]
    return {
        "losses": select_loss_kernel("auto", device),
        "columns": "triton" if columns == "columns_triton" else "torch",
    }


TRITON = {
    "row_losses_triton": "kvcat_nemo.kernels.losses.row_losses_triton",
    "columns_triton": "kvcat_nemo.kernels.attention.columns_triton",
}


def _triton(host: Host, name: str):
    """A module of Triton kernels. Skip where none can run: then PyTorch's operations are what runs take."""
    if not host.cuda:
        raise Skip("Triton's kernels run on CUDA alone")
    try:
        return importlib.import_module(TRITON[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise  # a module of the project's own that is not there is a failure
        raise Skip(f"Triton is not installed ({error})") from error


def _triton_works(host: Host, name: str) -> None:
    """A small case, by Triton's kernels and by PyTorch's operations: where it fails, runs silently take the slower form."""
    why = _triton(host, name).failure(torch.device(host.device))
    if why:
        raise Differs(f"runs take PyTorch's operations here: {why}")


def _loss_case(
    host: Host, kernel: str, paired: bool = True, temperature: float = 1.0, known: bool = False
) -> dict[str, float]:
    if kernel == "triton":
        _triton(host, "row_losses_triton")
    from kvcat_nemo.kernels.losses.token_loss import token_losses
    from kvcat_nemo.method.losses import distillation, next_token_ce

    T, B, V, M = (512, 2, 32_003, 1024) if host.cuda else (24, 2, 3_001, 64)
    passes = 1 + paired
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, passes * B, M, generator=rng).to(host.device, host.dtype)
    weight = (2 * torch.randn(V, M, generator=rng) * M**-0.5).to(host.device, host.dtype)
    labels = torch.randint(0, V, (B, T), generator=rng).to(host.device)
    weights = torch.rand(passes, B, T, generator=rng, dtype=torch.float64).to(host.device)

    def plain(h, w):
        logits = (h @ w.t()).transpose(0, 1)
        if not paired:
            return next_token_ce(logits, labels)[None]
        dense, masked = logits.chunk(2)
        return torch.stack([next_token_ce(dense, labels), distillation(dense, masked, temperature)])

    def ours(h, w):
        options = {"loss_weights": weights if known else None, "memory_mib": 64 if host.cuda else 0.1}
        options["kernel"] = kernel
        return token_losses(h, w, labels, paired=paired, temperature=temperature, **options)[:passes]

    def differentiate(function, *leaves):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), leaves)

    exact = differentiate(plain, hidden.double(), weight.double())
    found = differentiate(ours, hidden, weight)
    out = {}
    for name, value, expected in zip(("losses", "d hidden", "d weight"), found, exact, strict=True):
        error = float((value.double() - expected).norm() / expected.norm())
        out[name] = error
        if not error <= 1e-2:
            raise Differs(f"{name}: relative error {error:.3g}, bound 1e-2")
    return out
