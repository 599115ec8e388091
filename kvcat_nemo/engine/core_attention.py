"""Gated core attention: takes the place of Megatron's `core_attention` in a layer's spec.

Of windows that are split over context-parallel ranks a rank has its own queries, keys, values and gates here, and the
kernels fetch the others' (kernels/attention/context_parallel.py). Windows of packed documents are laid end to end.

Shapes: T tokens of this rank's part of a window, B windows, 2B the paired batch [dense | masked], H query heads and G KV
heads of this rank, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.engine.compat.gates import Gate, GatedCoreAttentionBase
from kvcat_nemo.engine.shared_rows import FirstSpansShared
from kvcat_nemo.kernels import (
    WindowSplit,
    announce,
    causal_attention,
    gated_attention,
    select_backend,
    span_gated_attention,
)
from kvcat_nemo.method.accumulated_attention import accumulated_attention
from kvcat_nemo.method.attention import document_positions


class GatedCoreAttention(GatedCoreAttentionBase):
    """Plain causal attention for the dense half of the batch, gated attention for the masked half.

    Without a gate the whole batch is dense. Where it applies to rows behind a cut alone, the
    rows before are the dense half's, whose keys, values and outputs the masked half gets bit for bit: fused kernels may
    round a row otherwise in a call of another length.
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
        self.wanted_backend = config.kvcat.attention_backend
        self.tp_group = pg_collection.tp if pg_collection is not None else None
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        self.split = WindowSplit.over(self.cp_group)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, gate: Gate | None, documents: Tensor | None
    ) -> Tensor:
        """[T, 2B, H, D], [T, 2B, G, D] twice, the gate or None → [T, 2B, H·D]. Always causal.

        documents: [n + 1] boundaries of the documents in the B windows, laid end to end; None: a window is one.
        """
        assert documents is None or documents.dim() == 1  # engine.paired_model has seen to it
        spans = None if gate is None else gate.spans
        shared = spans is not None and gate.shared_rows
        if shared:
            key, value = (FirstSpansShared.apply(x, spans) for x in (key, value))
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        # Resolved once for both halves: where a kernel takes one of them alone, `auto` must not mix two.
        self.backend = select_backend(
            self.wanted_backend,
            device=q.device,
            dtype=q.dtype,
            head_dim=q.shape[-1],
            gated=gate is not None,
            recent_window=self.config.kvcat.recent_window,
            packed=documents is not None,
            split=self.split is not None,
            spans=spans is not None,
        )
        announce(self.backend, q)
        if gate is None:
            out = self._dense(q, k, v, documents)
        else:
            B = gate.gate.shape[0]
            dense = self._dense(q[:B], k[:B], v[:B], documents)
            masked = self._masked(q[B:], k[B:], v[B:], gate, documents)
            out = torch.cat([dense, masked])
        out = out.transpose(0, 1)
        if shared:
            out = FirstSpansShared.apply(out, spans)
        return out.reshape(query.shape[0], query.shape[1], -1)

    def _dense(self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, documents: Tensor | None) -> Tensor:
        q, k, v = (_end_to_end(x, documents) for x in (q_BTHD, k_BTGD, v_BTGD))
        out = causal_attention(
            q, k, v, scale=self.scale, cu_seqlens=documents, split=self.split, backend=self.backend
        )
        return out.reshape(q_BTHD.shape)

    def _masked(
        self, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, given: Gate, documents: Tensor | None
    ) -> Tensor:
        kvcat, gate_BT = self.config.kvcat, given.gate
        if kvcat.gate_policy.reads_attention:
            gate_BT = self._attention_gate(q_BTHD, k_BTGD, documents)
        gate_BTG = gate_BT[..., None] if gate_BT.dim() == 2 else self._own_heads(gate_BT, k_BTGD.shape[2])
        settings = {
            "scale": self.scale,
            "sinks": kvcat.sinks,
            "gradient_cap": kvcat.gate_gradient_cap,
            "backend": self.backend,
        }
        if given.spans is not None:  # which know the documents
            return span_gated_attention(
                q_BTHD,
                k_BTGD,
                v_BTGD,
                gate_BTG,
                spans=given.spans,
                first_spans=not given.shared_rows,
                **settings,
            )
        q, k, v, gate = (_end_to_end(x, documents) for x in (q_BTHD, k_BTGD, v_BTGD, gate_BTG))
        out = gated_attention(
            q,
            k,
            v,
            gate,
            recent_window=kvcat.recent_window,
            cu_seqlens=documents,
            split=self.split,
            **settings,
        )
        return out.reshape(q_BTHD.shape)

    def _own_heads(self, gate_BTG: Tensor, held: int) -> Tensor:
        """The gates of this rank's KV heads; those of others get no gradient here, and theirs is summed with it later."""
        first = held * (self.tp_group.rank() if self.tp_group is not None else 0)
        return gate_BTG[..., first : first + held]

    @torch.no_grad()
    def _attention_gate(self, q_BTHD: Tensor, k_BTGD: Tensor, documents: Tensor | None) -> Tensor:
        """[B, T]: what a policy that reads attention makes of the mass of all ranks' queries and heads."""
        split = self.split
        position_BT = places = None
        if documents is not None:
            position, _ = document_positions(q_BTHD.shape[0] * q_BTHD.shape[1], documents)
            position_BT = position.view(q_BTHD.shape[:2])
        if split is not None:
            k_BTGD = split.whole(k_BTGD)
            places = split.positions(q_BTHD.shape[1], q_BTHD.device)
        mass = accumulated_attention(
            q_BTHD, k_BTGD, scale=self.scale, places_T=places, position_BT=position_BT
        )
        if split is not None:
            mass = split.sum(mass)
        if self.tp_group is not None and self.tp_group.size() > 1:
            torch.distributed.all_reduce(mass, group=self.tp_group)  # each rank holds its own heads' mass
        kvcat = self.config.kvcat
        gate_BT = kvcat.gate_policy.attention_gates(kvcat, mass, position_BT)
        return gate_BT if split is None else split.own(gate_BT)


def _end_to_end(x_BT: Tensor, documents: Tensor | None) -> Tensor:
    """[1, B·T, …] where windows hold documents, whose boundaries count through all of them; else as it is."""
    return x_BT if documents is None else x_BT.reshape(1, -1, *x_BT.shape[2:])
