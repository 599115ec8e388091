"""Cross-entropy and KL of a paired batch from hidden states and the output weight, without [T, V] logits.

One sweep over chunks of tokens: a chunk's logits of both passes are formed, its metrics taken, and its logits turned
in place into their gradients, which go at once into those of hidden states and output weight:

    CE_t = log Σ_v e^{x_tv} − x_t,label            ∂CE_t/∂x_tv = p_tv − [v = label]
    KL_t = τ²·Σ_v p_tv·(log p_tv − log q_tv)        ∂KL_t/∂y_tv = τ·(q_tv − p_tv)        p, q at temperature τ
    the reverse KL'_t = τ²·Σ_v q_tv·(log q_tv − log p_tv)   ∂KL'_t/∂y_tv = τ·q_tv·(log q_tv − log p_tv − KL'_t/τ²)

with x the dense pass' logits, y the masked pass'. ∂/∂weight = Σ_t w_t·δ_t·h_tᵀ mixes tokens, so the sweep must know the
weights w_t that the loss will give each token; the caller says so up to a common factor (`loss_weights`), and backward
only scales. Where they are not known, or turn out otherwise, backward sweeps again: exact too, one more matmul in four.

The vocabulary may be split between the processes of a group, and the sequence too.

Shapes: T tokens, B windows, 2B the paired batch [dense | masked], M width, V this rank's part of the (padded)
vocabulary, N rows of a chunk: its tokens × windows.
"""

from __future__ import annotations

import functools
import logging
import warnings
import weakref

import torch
from torch import Tensor

from kvcat_nemo.kernels.compat.torch_operators import assert_later
from kvcat_nemo.kernels.losses.token_sweep import TOKEN_METRICS, Settings, Vocabulary, sweep

__all__ = ["LOSS_KERNELS", "TOKEN_METRICS", "check_labels", "select_loss_kernel", "token_losses"]

LOSS_KERNELS = ("auto", "torch", "triton")

AUTO_DEVICES = {"cuda"}
"""Types of devices on which `auto` may take Triton."""

logger = logging.getLogger("kvcat_nemo.losses")

LOSS_MEMORY_MIB = {"cpu": 128, "cuda": 2048}
"""Default budget by device. Every chunk reads the weight twice and adds to its gradient: a GPU, which multiplies much faster
than it reads, wants many rows for that (docs/roofline.md); a CPU is content with a hundred."""


def _common_factor(grad: Tensor, weights: Tensor) -> float | None:
    """s with grad = s·weights up to rounding, or None when there is none. Waits for the device once."""
    g, w = grad.double(), weights.double()
    norm = (w * w).sum()
    factor = (g * w).sum() / norm
    tolerance = 32 * torch.finfo(grad.dtype).eps * factor.abs() * w.abs().max()
    off = (g - factor * w).abs().max() > tolerance
    norm, factor, off, asked = torch.stack([norm, factor, off.to(norm), g.any().to(norm)]).tolist()
    if norm == 0:
        return None if asked else 1.0
    return None if off else factor


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels_TB, weights_KTB, s: Settings, grad_enabled: bool, take):
        needs = ctx.needs_input_grad[:2]
        ready = weights_KTB if grad_enabled and any(needs) else None
        out, dh, dw = sweep(hidden, weight, labels_TB, ready, s, needs)
        ctx.save_for_backward(hidden, weight, labels_TB)
        ctx.ready = None if ready is None else (ready, dh, dw)
        ctx.settings = s, needs, take
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, labels_TB = ctx.saved_tensors
        s, needs, take = ctx.settings
        grad = grad[: 1 + s.paired]
        factor = None
        if ctx.ready is not None:
            weights, dh, dw = ctx.ready
            ctx.ready = None  # scaled in place below: a second backward sweeps again
            factor = _common_factor(grad, weights)
            if factor is None:
                warnings.warn(
                    "token_losses: the loss does not weigh tokens as loss_weights said; its gradients are computed again",
                    stacklevel=2,
                )
        if factor is None:
            _, dh, dw = sweep(hidden, weight, labels_TB, grad, s, needs)
        else:
            dh, dw = (x if x is None else x.mul_(factor) for x in (dh, dw))
        if dw is not None:
            dw = take(dw) if take is not None else dw.to(weight.dtype)
        return dh, dw, None, None, None, None, None


def select_loss_kernel(name: str, device: torch.device, group=None) -> str:
    """Resolve `auto`: "triton" or "torch". Says once when a device of AUTO_DEVICES falls back to "torch", and why.

    Args:
        group: processes between which the vocabulary is split, or None. Both forms exchange tensors of their own shapes, as
            often as they have chunks, so all processes of a group must take the same: "triton" only where each can. The first
            call for a group and device is a collective call.

    Raises:
        ValueError: for an unknown name, or for "triton" where it cannot be used (in every process of the group).
    """
    if name not in LOSS_KERNELS:
        raise ValueError(f"loss_kernel={name!r}: choose one of {', '.join(LOSS_KERNELS)}")
    if name == "torch" or (name == "auto" and device.type not in AUTO_DEVICES):
        return "torch"
    why = _triton_failure(device)
    if group is not None and group.size() > 1:
        agreed = _agreed.setdefault(group, {})
        if device not in agreed:
            usable = torch.tensor(int(not why), device=device)
            torch.distributed.all_reduce(usable, op=torch.distributed.ReduceOp.MIN, group=group)
            agreed[device] = bool(usable)
        if not agreed[device]:
            why = why or "another process that holds a part of the vocabulary cannot use it"
    if why and name == "triton":
        raise ValueError(f"loss_kernel=triton cannot be used on {device}: {why}; use auto or torch")
    if why:
        _say_once(device, why)
    return "torch" if why else "triton"


_agreed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
"""Process group → device → whether each of its processes can use Triton there."""


@functools.cache
def _triton_failure(device: torch.device) -> str:
    try:
        from kvcat_nemo.kernels.losses.row_losses_triton import failure
    except ImportError as error:
        return f"Triton is not installed ({error})"
    return failure(device)


@functools.cache
def _say_once(device: torch.device, why: str) -> None:
    logger.warning("CE + KL by PyTorch's operations, not by Triton, on %s: %s", device, why)


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Refuse labels that are no tokens: their cross-entropy would be that of nothing.

    Raises:
        ValueError: naming the label (on a CUDA device: a device-side assertion, which costs no synchronisation).
    """
    bad = (labels < 0) | (labels >= vocab_size)
    message = f"not a token of the vocabulary of {vocab_size}; hide such tokens by loss_mask and give them any token's label"
    if labels.device.type != "cpu":
        assert_later(~bad.any(), f"labels: {message}")
    elif bad.any():
        raise ValueError(f"labels: {int(labels[bad][0])} is {message}")


def token_losses(
    hidden_TBM: Tensor,
    weight_VM: Tensor,
    labels_BT: Tensor,
    *,
    vocab_size: int | None = None,
    paired: bool = True,
    temperature: float = 1.0,
    forward_share: float = 1.0,
    loss_weights: Tensor | None = None,
    group=None,
    sequence_parallel: bool = False,
    memory_mib: float = 0,
    kernel: str = "auto",
    take_weight_gradient=None,
) -> Tensor:
    """Per-token metrics of a batch, of which the first two carry gradients (to hidden states and output weight).

    Args:
        hidden_TBM: [T, 2B, M] for a paired batch (windows of the dense pass, then of the masked one), [T, B, M] else;
            [T/ranks, …] with `sequence_parallel`.
        weight_VM: output weight in the same dtype, or this rank's equal part of its rows.
        labels_BT: next tokens, [B, T].
        vocab_size: the true vocabulary; rows of the weight beyond it are padding. None: all rows of all ranks.
        temperature: τ of both sides of the KL, which is multiplied by τ².
        forward_share: λ of λ·KL(dense ‖ masked) + (1 − λ)·KL(masked ‖ dense), in [0, 1].
        loss_weights: what the loss will weigh each token's CE and KL with, up to a common factor, [2, B, T] ([1, B, T]
            when not paired). Given them, the gradients come out of the forward's sweep.
        group: process group over which the vocabulary is split, or None.
        memory_mib: MiB for the logits of a chunk (at least one token's are always formed); 0: LOSS_MEMORY_MIB.
        kernel: of LOSS_KERNELS: "triton" turns logits into gradients with two Triton kernels, "torch" with PyTorch's
            operations; "auto" takes Triton on CUDA where a small case agrees with PyTorch's form, which it tries once.
        take_weight_gradient: gets the weight's gradient in at least float32 and returns what autograd passes on.

    Returns:
        [4, B, T] (`TOKEN_METRICS`): cross-entropy of the dense pass; the KL (dense ‖ masked, or the mixture), no
        gradient to the dense side; cross-entropy of the masked pass (no gradient); 1 where both passes' likeliest tokens agree. [1, B, T]
        when not paired. In nats, float32 or wider.

    Raises:
        ValueError: on shapes or dtypes that do not fit, on labels that are no tokens, and when `kernel` cannot be used.
    """
    ranks = group.size() if group is not None else 1
    passes = 1 + paired
    B, T = labels_BT.shape
    held = T // ranks if sequence_parallel else T
    if hidden_TBM.shape != (held, passes * B, weight_VM.shape[1]) or (sequence_parallel and T % ranks):
        raise ValueError(
            f"hidden states {tuple(hidden_TBM.shape)}, output weight {tuple(weight_VM.shape)}, labels {tuple(labels_BT.shape)}: "
            f"not [T, {passes}·B, M], [V, M] and [B, T]"
        )
    if hidden_TBM.dtype != weight_VM.dtype:
        raise ValueError(
            f"hidden states are {hidden_TBM.dtype}, the output weight {weight_VM.dtype}: cast one"
        )
    if loss_weights is not None and loss_weights.shape != (passes, B, T):
        raise ValueError(f"loss_weights {tuple(loss_weights.shape)}: give [{passes}, {B}, {T}]")
    if vocab_size is None:
        vocab_size = ranks * len(weight_VM)
    check_labels(labels_BT, vocab_size)
    vocabulary = Vocabulary.of(group, sequence_parallel, len(weight_VM), vocab_size)
    memory = int((memory_mib or LOSS_MEMORY_MIB["cpu" if weight_VM.device.type == "cpu" else "cuda"]) * 2**20)
    triton = select_loss_kernel(kernel, weight_VM.device, group) == "triton"
    settings = Settings(vocabulary, paired, float(temperature), float(forward_share), memory, triton)
    labels = labels_BT.transpose(0, 1).contiguous()
    weights = None if loss_weights is None else loss_weights.detach().transpose(1, 2).contiguous()
    grad_enabled = torch.is_grad_enabled()
    out = _TokenLosses.apply(
        hidden_TBM, weight_VM, labels, weights, settings, grad_enabled, take_weight_gradient
    )
    return out.transpose(1, 2)
