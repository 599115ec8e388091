"""A transformer layer of the paired pass: the first layer of each group owns a router.

The gate of a group travels from layer to layer as Megatron's `context` (unused by decoder-only models), so that it is
an input and an output of the layer like the hidden states.

Shapes: T tokens, B windows, 2B the paired batch [dense | masked], M model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from kvcat_nemo.engine.collectives import RouterLoss, copy_to_tensor_parallel
from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.losses import budget_loss
from kvcat_nemo.method.router import Router, Routing

PROBE_TOKENS = 256
"""First tokens of the last window on which the share of gates that an update flipped is measured."""


@dataclass
class GroupStats:
    """What one group's mask did in one micro-batch; scalars without gradient."""

    group: int
    keep_rate: Tensor
    probability: Tensor | None = None
    budget: Tensor | None = None
    flipped: Tensor | None = None


class KVCatTransformerLayer(TransformerLayer):
    """Megatron's layer, with a router where a group begins and the group's gate handed to its attention."""

    def __init__(self, config, submodules, layer_number: int = 1, **kwargs):
        super().__init__(config, submodules, layer_number=layer_number, **kwargs)
        kvcat: KVCatConfig = config.kvcat
        self.place = layer_number - 1  # among this stage's layers
        layer = self.layer_number - 1
        self.group = kvcat.group_of_layer(layer, config.num_layers)
        self.begins_group = layer in kvcat.group_starts(config.num_layers)
        self.router = None
        if kvcat.policy == "router" and self.begins_group:
            self.router = Router(config.hidden_size, kvcat, self.group)
            for parameter in self.router.parameters():
                parameter.is_router = True
        self.stats: list[GroupStats] = []
        self._probe: tuple[Tensor, Tensor] | None = None
        self._probe_due = False

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, **kwargs):
        """One layer.

        Args:
            hidden_states: [T, 2B, M] (T/tp under sequence parallelism); context: the gates, [1 or R, B, T], or None for
                a plain dense pass.

        Returns:
            hidden states, and the gates for the next layer.
        """
        if context is None:
            return super().forward(hidden_states=hidden_states, context=None, **kwargs)
        if self.router is not None:
            hidden_states, gate = self._route(hidden_states)
            context = gate[None]
        gate = context[self.group if self.config.kvcat.policy == "random" else 0]
        if self.router is None and self.begins_group and not self._replaying:
            self.stats.append(GroupStats(self.group, self._fixed_keep_rate(gate)))
        kwargs["attention_bias"] = gate
        hidden_states, _ = super().forward(hidden_states=hidden_states, context=None, **kwargs)
        return hidden_states, context

    def _route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        kvcat: KVCatConfig = self.config.kvcat
        h_BTM = self._router_input(hidden_states)
        routing: Routing = self.router(h_BTM)
        budget = budget_loss(routing.p_BT, routing.hard_BT, kvcat.target_keep_fraction)
        weighted = budget * kvcat.budget_weight / kvcat.num_groups
        if torch.is_grad_enabled():
            hidden_states = RouterLoss.apply(hidden_states, weighted)
        if not self._replaying:
            self.stats.append(
                GroupStats(
                    self.group,
                    routing.hard_BT.mean(),
                    routing.p_BT.detach().mean(),
                    budget.detach(),
                    self._flipped_by_last_update(h_BTM, routing.hard_BT),
                )
            )
        return hidden_states, copy_to_tensor_parallel(routing.gate_BT, self._tp_group)

    def _router_input(self, hidden_states: Tensor) -> Tensor:
        kvcat: KVCatConfig = self.config.kvcat
        B = hidden_states.shape[1] // 2
        h = hidden_states[:, B:] if kvcat.router_input == "masked" else hidden_states[:, :B]
        if self.config.sequence_parallel:
            # Every rank routes the whole window: the gates must be whole anyway, and so must their gradients.
            h = gather_from_sequence_parallel_region(h.contiguous(), tensor_parallel_output_grad=False)
        h = h.transpose(0, 1)
        return h.detach() if kvcat.router_detach_input else h

    @property
    def _replaying(self) -> bool:
        """Whether this is the second run of a layer under full recomputation.

        The first runs without gradients; the router's loss therefore rides on the second alone, and figures are taken in
        the first alone. The same input gives the same gates: the router draws nothing.
        """
        config = self.config
        if config.recompute_granularity != "full" or not self.training or not torch.is_grad_enabled():
            return False
        return config.recompute_method == "uniform" or self.place < config.recompute_num_layers

    @property
    def _tp_group(self):
        return self.self_attention.core_attention.tp_group

    def _fixed_keep_rate(self, gate_BT: Tensor) -> Tensor:
        if self.config.kvcat.policy == "attention":  # the mask is made inside attention, with a fixed count
            T = gate_BT.shape[1]
            return gate_BT.new_tensor(math.ceil(self.config.kvcat.target_keep_fraction * T) / T)
        return gate_BT.mean()

    @torch.no_grad()
    def _flipped_by_last_update(self, h_BTM: Tensor, hard_BT: Tensor) -> Tensor | None:
        """Share of the previous step's gates that the new router decides otherwise, hidden states held fixed."""
        if not self.training:
            return None
        flipped = None
        if self._probe_due and self._probe is not None:
            h, before = self._probe
            flipped = (self.router(h).hard_BT != before).float().mean()
        self._probe_due = False
        self._probe = (h_BTM[:1, :PROBE_TOKENS].detach().clone(), hard_BT[:1, :PROBE_TOKENS].clone())
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
