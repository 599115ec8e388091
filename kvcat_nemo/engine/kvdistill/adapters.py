"""LoRA on Megatron's attention projections, for some rows of the paired batch's second half (arXiv 2503.10337).

Under tensor parallelism a rank holds what belongs to its heads: rows of B for Q, K and V, columns of A for O. The r numbers in
between are exchanged, not the hidden states. Parameters that every rank holds whole get the same gradient on each of them
(sequence parallelism: parts, which Megatron sums).

Shapes: T tokens of the window, P of this rank's part (T without sequence parallelism), B windows, 2B the paired batch
[teacher | student], M model width, H query heads and G KV heads of this rank, D head dim, r rank of the adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from kvcat_nemo.method.kvdistill import KVDistillConfig


@dataclass(frozen=True)
class StudentRows:
    """Which rows of the student's half are adapted, [T, B, 1] bool of whole windows."""

    context: Tensor
    """K and V."""
    routed: Tensor
    """Q and O: chosen rows of the context, or all of them without routing."""


class _Shared:
    """How tensor-parallel ranks share an adapter's r numbers."""

    def __init__(self, config, group):
        self.group, self.sequence_parallel = group, config.sequence_parallel
        self.ranks = 1 if group is None else group.size()

    def spread(self, low: Tensor) -> Tensor:
        """[P, B, r] of this rank's tokens, or the same on every rank → [T, B, r]; backward sums what each rank's heads ask."""
        if self.ranks == 1:
            return low
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(low, group=self.group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(low, group=self.group)

    def collect(self, low: Tensor) -> Tensor:
        """[T, B, r] of this rank's heads → the sum over ranks, [P, B, r]."""
        if self.ranks == 1:
            return low
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=self.group)

    def own(self, rows_TB1: Tensor) -> Tensor:
        """The rows of this rank's tokens."""
        if self.ranks == 1 or not self.sequence_parallel:
            return rows_TB1
        return rows_TB1.chunk(self.ranks)[self.group.rank()]


class QKVAdapter(nn.Module):
    """Adapters of a layer's fused QKV projection. The last layer has none for Q: nothing reads its context rows' output."""

    def __init__(self, config, distill: KVDistillConfig, layer: int, group, with_q: bool):
        super().__init__()
        self.shared = _Shared(config, group)
        self.scale, self.D = distill.lora_scale, config.kv_channels
        self.G = config.num_query_groups // self.shared.ranks
        self.repeats = config.num_attention_heads // config.num_query_groups
        widths = {"q": self.G * self.repeats * self.D, "k": self.G * self.D, "v": self.G * self.D}
        self.names = tuple(name for name in widths if with_q or name != "q")
        for name in self.names:
            down = _drawn(config, (distill.lora_rank, config.hidden_size), distill.seed, layer, name)
            down.sequence_parallel = config.sequence_parallel
            up = nn.Parameter(torch.zeros(widths[name], distill.lora_rank, dtype=config.params_dtype))
            tensor_parallel.set_tensor_model_parallel_attributes(up, True, 0, 1)
            self.register_parameter(f"{name}_down", down)
            self.register_parameter(f"{name}_up", up)

    def forward(self, x_PBM: Tensor, rows: StudentRows) -> Tensor:
        """What is added to the student's half, in Megatron's order: of each KV head its queries, its key, its value."""
        downs = torch.cat([getattr(self, f"{name}_down") for name in self.names]).to(x_PBM.dtype)
        low = self.shared.spread(x_PBM @ downs.T).chunk(len(self.names), -1)
        parts = dict(zip(self.names, low, strict=True))
        out = []
        for name in ("q", "k", "v"):
            if name not in parts:
                size = self.repeats * self.D
                out.append(low[0].new_zeros(*low[0].shape[:2], self.G, size))
                continue
            up = getattr(self, f"{name}_up").to(x_PBM.dtype)
            delta = torch.where(rows.routed if name == "q" else rows.context, parts[name] @ up.T, 0.0)
            out.append(delta.unflatten(-1, (self.G, -1)))
        return self.scale * torch.cat(out, -1).flatten(2)


class OutputAdapter(nn.Module):
    """The adapter of a layer's output projection."""

    def __init__(self, config, distill: KVDistillConfig, layer: int, group):
        super().__init__()
        self.shared, self.scale = _Shared(config, group), distill.lora_scale
        width = config.num_attention_heads * config.kv_channels
        whole = _drawn(config, (distill.lora_rank, width), distill.seed, layer, "o")
        rank = 0 if group is None else group.rank()
        self.o_down = nn.Parameter(whole.data.chunk(self.shared.ranks, 1)[rank].contiguous())
        tensor_parallel.set_tensor_model_parallel_attributes(self.o_down, True, 1, 1)
        self.o_up = nn.Parameter(
            torch.zeros(config.hidden_size, distill.lora_rank, dtype=config.params_dtype)
        )
        self.o_up.sequence_parallel = config.sequence_parallel

    def forward(self, a_TBX: Tensor, rows: StudentRows) -> Tensor:
        """What is added to the student's half, [P, B, M]. a_TBX: attention of this rank's heads, [T, B, H·D]."""
        low = self.shared.collect(a_TBX @ self.o_down.to(a_TBX.dtype).T)
        delta = low @ self.o_up.to(a_TBX.dtype).T
        return self.scale * torch.where(self.shared.own(rows.routed), delta, 0.0)


def _drawn(config, shape: tuple[int, int], seed: int, layer: int, name: str) -> nn.Parameter:
    """A of an adapter, from seed, layer and projection alone: every rank draws the same."""
    rng = torch.Generator().manual_seed((seed * 1009 + layer) * 4 + "qkvo".index(name))
    return nn.Parameter((torch.randn(shape, generator=rng) / math.sqrt(shape[1])).to(config.params_dtype))
