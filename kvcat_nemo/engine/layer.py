"""A transformer layer of the paired pass: the first layer of each group owns a router.

The gate of a group travels from layer to layer, an input and an output of each like the hidden states (engine.compat.gates).
Packed documents come as their boundaries.

Shapes: T tokens of this rank's part of a window (all of it without sequence and context parallelism), B windows, 2B the
paired batch [dense | masked], M model width.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from kvcat_nemo.engine.collectives import (
    copy_to_tensor_parallel,
    gather_sequence,
    window_mean,
    window_sum,
)
from kvcat_nemo.engine.compat.gates import Gate, GatedTransformerLayer
from kvcat_nemo.engine.group_stats import GroupStats, fixed_stats
from kvcat_nemo.engine.segments import TokenSegments
from kvcat_nemo.engine.shared_rows import FirstSpansShared
from kvcat_nemo.method.attention import document_positions
from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.router import Routing
from kvcat_nemo.method.spans import Spans

PROBE_TOKENS = 256
"""First tokens of the last window on which the share of gates that an update flipped is measured."""


class KVCatTransformerLayer(GatedTransformerLayer):
    """Megatron's layer, with a router where a group begins and the group's gate handed to its attention."""

    def __init__(self, config, submodules, layer_number: int = 1, **kwargs):
        super().__init__(config, submodules, layer_number=layer_number, **kwargs)
        kvcat: KVCatConfig = config.kvcat
        self.place = layer_number - 1  # among this stage's layers
        layer = self.layer_number - 1
        self.group = kvcat.group_of_layer(layer, config.num_layers)
        self.begins_group = layer in kvcat.group_starts(config.num_layers)
        self.router = None
        if kvcat.gate_policy.has_routers and self.begins_group:
            self.router = kvcat.gate_policy.build_router(
                kvcat, config.hidden_size, self.group, config.num_query_groups
            )
            for parameter in self.router.parameters():
                parameter.is_router = True
                # A rank routes its own tokens: Megatron then sums the gradients over tensor-parallel ranks, once.
                parameter.sequence_parallel = config.sequence_parallel
        self.stats: list[GroupStats] = []
        self._probe: tuple | None = None
        self._probe_due = False

    def gated_forward(
        self,
        hidden_states: Tensor,
        *,
        gates: Tensor | None,
        spans: Tensor | None,
        documents: Tensor | None,
        rotary_pos_emb: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer.

        Args:
            hidden_states: [T, 2B, M] (T/tp under sequence parallelism).
            gates: [1 or R, B, T] ([1, B, T, G] with a mask for each of all ranks' G KV heads), or None for a plain dense pass.
            spans: the table of method.spans, where gates apply to rows behind a cut alone; None: to all rows.
            documents: [n + 1] boundaries of packed documents, or None.
            rotary_pos_emb: angles of the window's places.

        Returns:
            hidden states, and the gates for the next layer.
        """
        if documents is not None and rotary_pos_emb is not None:
            passes = 1 if gates is None else 2
            rotary_pos_emb = self._begin_anew(rotary_pos_emb, documents, hidden_states.shape[1], passes)
        rest = {"documents": documents, "rotary_pos_emb": rotary_pos_emb, **kwargs}
        if gates is None:
            return self.plain_forward(hidden_states, gate=None, **rest), None
        if self.router is not None:
            hidden_states, gate = self.route(hidden_states, documents)
            gates = gate[None]
        gate = gates[self.group if len(gates) > 1 else 0]
        held = None if spans is None else Spans.from_table(spans, *gate.shape[:2])
        if self.router is None and self.begins_group and not self.is_recomputation:
            split = self.self_attention.core_attention.split
            self.stats.append(fixed_stats(self.group, self.config.kvcat, gate, documents, held, split))
        hidden_states = self.plain_forward(hidden_states, gate=Gate(gate, held), **rest)
        if held is not None:
            first = hidden_states.shape[0] * (self.tp_group.rank() if self._sequence_parallel else 0)
            hidden_states = FirstSpansShared.apply(hidden_states, held, first)
        return hidden_states, gates

    def _begin_anew(self, angles_T11D: Tensor, documents: Tensor, rows: int, passes: int) -> Tensor:
        """Rotary angles by each token's place in its document, [T, rows, 1, D], rows being the windows of all passes.

        Only differences of places matter, so without this results differ by the angles' rounding in float32 alone; the fused
        rotary kernel, which takes one row of angles for all windows, is content with that.
        """
        if self.config.apply_rope_fusion:
            return angles_T11D
        T = len(angles_T11D)
        places, _ = document_positions(T * rows // passes, documents)
        return angles_T11D[:, 0, 0][places.view(-1, T).T.repeat(1, passes)][:, :, None]

    def route(self, hidden_states: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        """All that the group's router does in a micro-batch: its gates, its loss and its statistics.

        A method of its own so that it can be timed (benchmarks/step.py); called where `router` is there.

        Returns:
            hidden states (the router's loss rides on their gradient), and the gates [B, T] or [B, T, G].
        """
        kvcat: KVCatConfig = self.config.kvcat
        h_BTM = self._router_input(hidden_states)
        segments, position_BT = self._segments(h_BTM, documents)
        routing: Routing = self.router(h_BTM, segments, position_BT)
        group = None if segments is None else segments.group
        kept, probability = window_mean(routing.hard_BT, group), window_mean(routing.p_BT, group)
        budget = kvcat.gate_policy.router_loss(kvcat, kept, probability)
        weighted = budget * kvcat.budget_weight / kvcat.num_groups
        if torch.is_grad_enabled():
            hidden_states = MoEAuxLossAutoScaler.apply(hidden_states, weighted)
        if not self.is_recomputation:
            flipped = self._flipped_by_last_update(h_BTM, routing.hard_BT, segments, position_BT)
            self.stats.append(GroupStats(self.group, kept, probability.detach(), budget.detach(), flipped))
        # Attention needs the gates of all of this rank's keys, for its own heads.
        whole = gather_sequence if self._sequence_parallel else copy_to_tensor_parallel
        return hidden_states, whole(routing.gate_BT, self.tp_group)

    def _router_input(self, hidden_states: Tensor) -> Tensor:
        kvcat: KVCatConfig = self.config.kvcat
        B = hidden_states.shape[1] // 2
        h = hidden_states[:, B:] if kvcat.router_input == "masked" else hidden_states[:, :B]
        h = h.transpose(0, 1)
        return h.detach() if kvcat.router_detach_input else h

    def _segments(
        self, h_BTM: Tensor, documents: Tensor | None
    ) -> tuple[TokenSegments | None, Tensor | None]:
        """How the tokens of h are parts of whole windows, and their places in their documents."""
        tp, cp = self.tp_group, self._cp_group
        tokens = h_BTM.shape[1]
        position_BT = None
        if documents is not None:
            ranks = tp.size() if self._sequence_parallel else 1
            positions, _ = document_positions(h_BTM.shape[0] * tokens * ranks, documents)
            position_BT = positions.view(h_BTM.shape[0], -1)
        both = None
        if self._sequence_parallel and cp is not None and cp.size() > 1:
            both = parallel_state.get_tensor_and_context_parallel_group()
        segments = TokenSegments.of_hidden_states(tokens, tp, cp, both, self._sequence_parallel, position_BT)
        if segments is not None and position_BT is not None:
            position_BT = segments.own(position_BT)
        return segments, position_BT

    @property
    def is_recomputation(self) -> bool:
        """Whether this is the second run of a layer under full recomputation.

        The first runs without gradients; the router's loss therefore rides on the second alone, and figures are taken in
        the first alone. The same input gives the same gates: the router draws nothing.
        """
        config = self.config
        if config.recompute_granularity != "full" or not self.training or not torch.is_grad_enabled():
            return False
        return config.recompute_method == "uniform" or self.place < config.recompute_num_layers

    @property
    def tp_group(self):
        return self.self_attention.core_attention.tp_group

    @property
    def _cp_group(self):
        return self.self_attention.core_attention.cp_group

    @property
    def _sequence_parallel(self) -> bool:
        return self.config.sequence_parallel and self.tp_group is not None and self.tp_group.size() > 1

    @torch.no_grad()
    def _flipped_by_last_update(
        self, h_BTM: Tensor, hard_BT: Tensor, segments: TokenSegments | None, position_BT: Tensor | None
    ) -> Tensor | None:
        """Share of the previous step's gates that the new router decides otherwise, hidden states held fixed."""
        if not self.training:
            return None
        flipped = None
        if self._probe_due and self._probe is not None:
            h, before, *where = self._probe
            changed = (self.router(h, *where).hard_BT != before).double()
            counts = window_sum(
                torch.stack([changed.sum(), changed.new_tensor(changed.numel())]),
                None if where[0] is None else where[0].group,
            )
            flipped = counts[0] / counts[1]
        self._probe_due = False
        first, own = slice(PROBE_TOKENS), None
        if segments is not None:
            first, own = segments.own_of_first(PROBE_TOKENS), segments.first(PROBE_TOKENS, windows=1)
        position = None if position_BT is None else position_BT[:1, first]
        self._probe = h_BTM[:1, first].detach().clone(), hard_BT[:1, first].clone(), own, position
        return flipped

    def pop_stats(self) -> list[GroupStats]:
        """The micro-batches' statistics since the last call, which marks the end of a step."""
        stats, self.stats = self.stats, []
        self._probe_due = True
        return stats

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Megatron's, with routers under their own keys.

        Megatron stacks the layers of a model into one tensor per parameter. A router exists in some layers only, so its
        parameters are stored unstacked, as `…layers.router.{group}.…`.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, tensor in state.items():
            if not name.startswith(f"{prefix}router."):
                continue
            assert isinstance(tensor, ShardedTensor), name
            state[name] = ShardedTensor.from_rank_offsets(
                f"{prefix}router.{self.group}.{name.removeprefix(f'{prefix}router.')}",
                tensor.data,
                replica_id=tensor.replica_id,
            )
        return state


def kvcat_layers(model: torch.nn.Module) -> list[KVCatTransformerLayer]:
    """All KV-CAT layers of a model or of a list of pipeline chunks."""
    return [module for module in model.modules() if isinstance(module, KVCatTransformerLayer)]
