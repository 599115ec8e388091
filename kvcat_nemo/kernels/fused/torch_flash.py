"""PyTorch's own FlashAttention-2 for CUDA as a FusedKernel: what needs no package beside PyTorch.

`aten::_flash_attention_forward` and `aten::_flash_attention_backward` are the operators below
`scaled_dot_product_attention` and `torch.nn.attention.varlen`. Schemas as of PyTorch 2.9 to 2.13; an operator that takes
other arguments is refused by name.

What gated attention relies on, and where the sources do it (aten/src/ATen/native/transformers/cuda/):
- backward takes out and logsumexp as arguments (attention_backward.cu) and hands them to the kernels that flash-attn has
  too: δ = Σ_c do·o in flash_attn/flash_bwd_preprocess_kernel.h, P from the lse in flash_bwd_kernel.h;
- logsumexp is float32, natural, [B, H, T], for packed documents [H, T] (flash_attn/flash_api.cpp, mha_varlen_fwd); the
  kernels read it by shape alone, so that it is handed over contiguous;
- one width for q, k and v, a multiple of 8 up to 256, the last dimension contiguous; H a multiple of G;
- what stands for the random state has had two forms (a seed and an offset; a pair and an unused tensor): both are
  handed back in the places they came from, and without dropout nobody reads them;
- determinism is torch.use_deterministic_algorithms' (attention_backward.cu), and not under its warn_only: backward runs
  under it where kernels/fused/determinism.py says so.

Shapes: B batch, T tokens, H query heads, G KV heads, D width of queries and keys, E width of values.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.kernels.compat.torch_operators import cuda_flash, schema_of
from kvcat_nemo.kernels.fused.cuda_kernel import FlashWidths, one_width
from kvcat_nemo.kernels.fused.determinism import deterministic
from kvcat_nemo.kernels.fused.flash import left_of, longest

OLDEST = (2, 9)
"""Before it the log-sum-exps of packed documents had another shape in some versions."""

_SEQUENCES = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal")
TAKES = {
    "_flash_attention_forward": ("query", "key", "value", *_SEQUENCES, "return_debug_mask"),
    "_flash_attention_backward": (
        *("grad_out", "query", "key", "value", "out", "logsumexp"),
        *_SEQUENCES,
        *(None, None),  # the random state's two parts, whatever their names
    ),
}
"""Operator → its arguments in order, as they are handed over."""
SETTINGS = {"scale", "window_size_left", "window_size_right"}
"""Handed over by name, to both."""
RETURNS = {"_flash_attention_forward": 5, "_flash_attention_backward": 3}

NO_WIDE_BACKWARD = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities whose shared memory is too small for backward of widths above 192 up to 224, by PyTorch's own rule
(sdp_utils.cpp)."""


def unfit(name: str, schema: torch.FunctionSchema) -> str:
    """Why that operator cannot be called as TorchKernel calls it; empty: it can."""
    positional = [x for x in schema.arguments if not x.kwarg_only]
    named = {x.name: x for x in schema.arguments if x.kwarg_only}
    wanted = TAKES[name]
    if len(positional) < len(wanted) or any(
        want not in (None, have.name) for want, have in zip(wanted, positional, strict=False)
    ):
        return f"{name} takes {', '.join(x.name for x in positional)}"
    if SETTINGS - set(named):
        return f"{name} does not take {', '.join(sorted(SETTINGS - set(named)))}"
    more = positional[len(wanted) :] + [x for key, x in named.items() if key not in SETTINGS]
    if any(not x.has_default_value() for x in more):
        return f"{name} wants {', '.join(x.name for x in more if not x.has_default_value())}"
    if len(schema.returns) != RETURNS[name]:
        return f"{name} returns {len(schema.returns)} values"
    return ""


def _require_operators() -> None:
    """Raise a ValueError when this PyTorch has no such operators, or others."""
    fix = "use te or flash"
    version = tuple(map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups()))
    if version < OLDEST:
        raise ValueError(
            f"attention_backend=torch: PyTorch {torch.__version__} is older than 2.9; install a newer one, or {fix}"
        )
    if torch.version.hip:
        raise ValueError(f"attention_backend=torch: PyTorch is built for ROCm, not for CUDA; {fix}")
    if not torch.backends.cuda.is_flash_attention_available():
        raise ValueError(f"attention_backend=torch: this PyTorch was built without FlashAttention; {fix}")
    for name in TAKES:
        operator = cuda_flash(name)
        why = f"there is no {name}" if operator is None else unfit(name, schema_of(operator))
        if why:
            raise ValueError(
                f"attention_backend=torch: PyTorch {torch.__version__} has another interface ({why}); {fix}"
            )


class TorchKernel(FlashWidths):
    """See FusedKernel for the contract."""

    name, needs = "torch", "it"

    def check(
        self,
        *,
        head_dim_qk: int,
        head_dim_v: int,
        dtype,
        device,
        window: int | None = None,
        packed: bool = False,
        causal: bool = True,
    ) -> None:
        """See FusedKernel.check."""
        device = torch.device(device)
        self.check_tensors(device, dtype)
        _require_operators()
        capability, width = self.check_capability(device), max(head_dim_qk, head_dim_v)
        self.check_widths(head_dim_qk, head_dim_v)
        if 192 < width <= 224 and capability in NO_WIDE_BACKWARD:
            raise ValueError(
                f"attention_backend=torch: head dims ({head_dim_qk}, {head_dim_v}) have no backward on compute capability "
                f"{capability[0]}.{capability[1]}; use te or flash"
            )
        self.check_window(window)

    def forward(
        self, q_BTHD, k_BTGD, v_BTGE, *, scale, window=None, cu_seqlens=None, causal=True
    ) -> tuple[Tensor, Tensor, Any]:
        """See FusedKernel.forward."""
        E = v_BTGE.shape[-1]
        tensors = one_width(q_BTHD, k_BTGD, v_BTGE)
        length = None if cu_seqlens is None else longest(cu_seqlens)
        bounds = _bounds(q_BTHD, k_BTGD, cu_seqlens, length)
        if length is not None:
            tensors = [x[0] for x in tensors]
        o, lse, *random_state, _ = cuda_flash("_flash_attention_forward")(
            *tensors, *bounds, 0.0, causal, False, **_settings(scale, window, causal)
        )
        if length is not None:
            o, lse = o[None], lse[None]
        return o[..., :E], lse, (length, random_state)

    def backward(
        self,
        do_BTHE,
        q_BTHD,
        k_BTGD,
        v_BTGE,
        o_BTHE,
        lse_BHT,
        saved,
        *,
        scale,
        window=None,
        cu_seqlens=None,
        causal=True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See FusedKernel.backward."""
        D, E = q_BTHD.shape[-1], v_BTGE.shape[-1]
        length, random_state = saved
        q, k, v = one_width(q_BTHD, k_BTGD, v_BTGE)
        do, o = (F.pad(x, (0, v.shape[-1] - E)).contiguous() for x in (do_BTHE, o_BTHE))
        tensors, lse = [do, q, k, v, o], lse_BHT
        if length is not None:
            tensors, lse = [x[0] for x in tensors], lse[0]
        with _one_order():
            grads = cuda_flash("_flash_attention_backward")(
                *tensors,
                lse.contiguous(),
                *_bounds(q_BTHD, k_BTGD, cu_seqlens, length),
                0.0,
                causal,
                *random_state,
                **_settings(scale, window, causal),
            )
        dq, dk, dv = grads if length is None else (x[None] for x in grads)
        return dq[..., :D], dk[..., :D], dv[..., :E]


@contextlib.contextmanager
def _one_order() -> Iterator[None]:
    """PyTorch's operator asks PyTorch's setting alone: it is set for the call where another one asks for determinism."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if not deterministic() or before == (True, False):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _bounds(q_BTHD: Tensor, k_BTGD: Tensor, cu_seqlens: Tensor | None, length: int | None) -> tuple:
    """Boundaries of queries and of keys, and the longest of each."""
    if length is None:
        return None, None, q_BTHD.shape[1], k_BTGD.shape[1]
    return cu_seqlens, cu_seqlens, length, length


def _settings(scale: float, window: int | None, causal: bool) -> dict[str, Any]:
    return {
        "scale": scale,
        "window_size_left": left_of(window),
        "window_size_right": 0 if causal else -1,
    }
