"""What a layer group's mask did in a micro-batch, for the figures of a step. Shapes: B windows, T tokens of this rank's part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcat_nemo.engine.collectives import window_mean
from kvcat_nemo.kernels import WindowSplit
from kvcat_nemo.method.attention import document_positions
from kvcat_nemo.method.config import KVCatConfig
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
    policy = kvcat.gate_policy
    if not policy.reads_attention:
        return window_mean(gate_BT, None if split is None else split.group)
    # Gates are made inside attention; how many are open does not depend on it.
    position_BT = None
    if documents is not None:
        position_BT = document_positions(gate_BT.numel(), documents)[0].view_as(gate_BT)
    whole = gate_BT if split is None else gate_BT.repeat(1, split.ranks)
    return policy.attention_gates(kvcat, torch.zeros_like(whole), position_BT).mean()
