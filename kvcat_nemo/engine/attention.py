"""Gated core attention: takes the place of Megatron's `core_attention` in a layer's spec.

Shapes: T tokens, B windows, 2B the paired batch [dense | masked], H query heads and G KV heads of this rank, D head dim.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from kvcat_nemo.kernels import announce, causal_attention, gated_attention
from kvcat_nemo.method.policies import accumulated_attention, attention_gate


class GatedSelfAttention(SelfAttention):
    """Megatron's, but selective recomputation gets the gate as an input of what it replays.

    Megatron's closes over `attention_bias`: replaying would back-propagate through the router's graph, once in every layer
    of the group, instead of handing the gate's gradient on.
    """

    def _checkpointed_attention_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        rotary_pos_emb=None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        def replayed(query, key, value, gate):
            return self.core_attention(
                query, key, value, None, attention_bias=gate, packed_seq_params=packed_seq_params
            )

        return tensor_parallel.checkpoint(replayed, False, query, key, value, attention_bias)


class GatedCoreAttention(MegatronModule):
    """Plain causal attention for the dense half of the batch, gated attention for the masked half.

    The gate comes as `attention_bias`, the one per-layer tensor that Megatron hands through to core attention; without
    it the whole batch is dense.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        **unused,
    ):
        super().__init__(config=config)
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.backend = config.kvcat.attention_backend
        self.tp_group = pg_collection.tp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """[T, 2B, H, D], [T, 2B, G, D] twice, gate [B, T] or None → [T, 2B, H·D]. The mask is always causal."""
        if packed_seq_params is not None:
            raise ValueError("packed_seq_params: packed documents are not supported by gated attention yet")
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        announce(self.backend, q)
        if attention_bias is None:
            out = self._dense(q, k, v)
        else:
            B = attention_bias.shape[0]
            dense = self._dense(q[:B], k[:B], v[:B])
            out = torch.cat([dense, self._masked(q[B:], k[B:], v[B:], attention_bias)])
        return out.transpose(0, 1).reshape(query.shape[0], query.shape[1], -1)

    def _dense(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        return causal_attention(q_BTHD, k_BTGD, v_BTGD, scale=self.scale, backend=self.backend)

    def _masked(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, gate_BT: Tensor) -> Tensor:
        kvcat = self.config.kvcat
        if kvcat.policy == "attention":
            mass = accumulated_attention(q_BTHD, k_BTGD, scale=self.scale)
            if self.tp_group is not None and self.tp_group.size() > 1:
                torch.distributed.all_reduce(mass, group=self.tp_group)  # each rank holds its own heads' mass
            gate_BT = attention_gate(mass, kvcat.target_keep_fraction)
        return gated_attention(
            q_BTHD,
            k_BTGD,
            v_BTGD,
            gate_BT[..., None],
            scale=self.scale,
            sinks=kvcat.sinks,
            recent_window=kvcat.recent_window,
            gradient_cap=kvcat.gate_gradient_cap,
            backend=self.backend,
        )
