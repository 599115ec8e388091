"""What the fused kernels for CUDA have in common: the tensors and the widths that they take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_WIDTH = 256
"""Of heads, in FlashAttention's kernels."""


class CudaKernel:
    """A kernel for bf16 tensors on CUDA; see FusedKernel for the contract."""

    name: str
    needs: str
    """What needs CUDA, as the error says it."""
    takes_key_bias = False
    device_type = "cuda"
    dtypes = (torch.bfloat16,)

    def check_tensors(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raise a ValueError that names a device or a dtype that does not fit."""
        if device.type != self.device_type:
            raise ValueError(
                f"attention_backend={self.name}: tensors are on {device}; {self.needs} needs CUDA, use auto"
            )
        if dtype not in self.dtypes:
            raise ValueError(
                f"attention_backend={self.name}: dtype {dtype} does not fit; use bf16 (fp16 cannot hold the weights of gate "
                "gradients, FP8 attention is not supported)"
            )

    def check_window(self, window: int | None) -> None:
        """Raise a ValueError on a sliding window without a slot."""
        if window is not None and window < 1:
            raise ValueError(f"window={window}: give at least 1, a query's own slot")


class FlashWidths(CudaKernel):
    """FlashAttention's own limits: Ampere on, and one width for queries, keys and values, a multiple of 8 up to 256."""

    def check_capability(self, device: torch.device) -> tuple[int, int]:
        """The device's compute capability; a ValueError where it is below 8.0."""
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ValueError(f"attention_backend={self.name}: compute capability {capability} is below 8.0")
        return capability

    def check_widths(self, head_dim_qk: int, head_dim_v: int) -> None:
        """Raise a ValueError on widths that `widths` would not give."""
        if head_dim_qk % 8 or head_dim_v % 8 or max(head_dim_qk, head_dim_v) > MAX_WIDTH:
            raise ValueError(
                f"attention_backend={self.name}: head dims ({head_dim_qk}, {head_dim_v}) must be multiples of 8 up to {MAX_WIDTH}"
            )

    def widths(self, head_dim_qk: int, head_dim_v: int) -> tuple[int, int]:
        """Both widths as one multiple of 8."""
        width = -(-max(head_dim_qk, head_dim_v) // 8) * 8
        if width > MAX_WIDTH:
            raise ValueError(
                f"attention_backend={self.name}: head dims ({head_dim_qk}, {head_dim_v}) exceed {MAX_WIDTH}"
            )
        return width, width


def one_width(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v padded with zeros to the wider of their widths (`widths` has seen to it; other callers may not)."""
    width = max(q.shape[-1], v.shape[-1])
    return tuple(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
