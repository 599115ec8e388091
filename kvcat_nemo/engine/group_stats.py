"""What a layer group's mask did in a micro-batch, for the figures of a step. Shapes: B windows, T tokens of this rank's part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcat_nemo.engine.collectives import window_mean
from kvcat_nemo.kernels import WindowSplit
from kvcat_nemo.method.attention import document_positions
from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.policies import attention_gate
from kvcat_nemo.method.spans import Spans


@dataclass
class GroupStats:
    """One group's mask in one micro-batch; scalars without gradient."""

    group: int
    keep_rate: Tensor
    probability: Tensor | None = None
    budget: Tensor | None = None
    flipped: Tensor | None = None
    behind: Tensor | None = None
    """Share of rows behind a cut, where gates apply to those alone."""


def fixed_stats(
    group: int,
    kvcat: KVCatConfig,
    gate_BT: Tensor,
    documents: Tensor | None,
    spans: Spans | None,
    split: WindowSplit | None,
) -> GroupStats:
    """Of a policy without routers.

    Args:
        documents, spans: as the layer gets them; with spans the keep rate is that of the slots which some row sees through its
            gate, 1 where there is none.
    """
    if spans is None:
        return GroupStats(group, _keep_rate(kvcat, gate_BT, documents, split))
    slots = int(
        spans.gated_BT().sum()
    )  # counted on the CPU, where the spans are: a GPU would have to be waited for
    kept = (gate_BT * spans.gated_BT(gate_BT.device)).sum() / slots if slots else gate_BT.new_ones(())
    return GroupStats(group, kept, behind=gate_BT.new_full((), float(spans.behind_BT().float().mean())))


def _keep_rate(
    kvcat: KVCatConfig, gate_BT: Tensor, documents: Tensor | None, split: WindowSplit | None
) -> Tensor:
    if kvcat.policy != "attention":
        return window_mean(gate_BT, None if split is None else split.group)
    keep = kvcat.target_keep_fraction
    if documents is not None:
        positions, _ = document_positions(gate_BT.numel(), documents)
        return attention_gate(torch.zeros_like(gate_BT), keep, positions.view_as(gate_BT)).mean()
    T = gate_BT.shape[1] * (1 if split is None else split.ranks)
    return gate_BT.new_tensor(
        math.ceil(keep * T) / T
    )  # the mask is made inside attention, with a fixed count
