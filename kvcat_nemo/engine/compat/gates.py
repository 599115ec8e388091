"""The way of gates and document boundaries through Megatron's modules, which hand on arguments of their own alone.

    ours                                   GPTModel → block → layer     layer → self-attention → core attention
    gates [R or 1, B, T] (or with heads)   context                      attention_bias, of the one gate that applies
    spans [N, 4] (method.spans)            context_mask                 attention_bias, beside the gate
    documents [n + 1]                      attention_mask               attention_mask

`context` and `context_mask` are for cross-attention, which decoder-only models have not; they are tensors, so that full
recomputation saves them and back-propagates through them, and a layer returns `context`. `attention_bias` is handed to core
attention as it is. `attention_mask` is a triangle in other models. Everything outside this file uses the names on the left.

Megatron's layer and attention take no other arguments (0.15.3): TransformerBlock and SelfAttention list what they hand on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from kvcat_nemo.engine.compat import MEGATRON
from kvcat_nemo.method.spans import Spans

_HANDED_ON = "hand gates and the boundaries of documents to attention"
MEGATRON.reach(GPTModel, "forward", _HANDED_ON, takes=("attention_mask", "extra_block_kwargs"))
MEGATRON.reach(TransformerBlock, "forward", _HANDED_ON, takes=("attention_mask", "context", "context_mask"))
MEGATRON.reach(
    TransformerLayer, "_forward_attention", _HANDED_ON, takes=("attention_mask", "context", "attention_bias")
)
MEGATRON.reach(
    SelfAttention,
    "_checkpointed_attention_forward",
    "give selective recomputation the gate as an input",
    takes=("query", "key", "value", "attention_mask", "attention_bias", "packed_seq_params"),
)
MEGATRON.reach(
    GPTModel,
    "_postprocess",
    "make token losses where Megatron makes logits",
    takes=("hidden_states", "labels", "loss_mask"),
)


@dataclass(frozen=True)
class Gate:
    """What a layer's attention is given beside queries, keys and values."""

    gate: Tensor
    """[B, T], or [B, T, G] for each of all ranks' KV heads."""
    spans: Spans | None = None
    """Which rows it applies to; None: every later one."""
    shared_rows: bool = True
    """With spans: whether rows of a document's first span are the same in both halves, and so the dense half's alone. KV-Distill's
    are not: it adapts them."""


class GatedGPTModel(GPTModel):
    """A GPTModel whose layers are given gates, and whose last stage gives `token_metrics` where there are labels."""

    def run(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        documents: Tensor | None,
        labels: Tensor | None,
        gates: Tensor | None = None,
        spans: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """GPTModel's forward; see the module's docstring for documents, gates and spans."""
        if gates is not None:
            kwargs["extra_block_kwargs"] = {"context": gates, "context_mask": spans}
        return GPTModel.forward(self, input_ids, position_ids, documents, labels=labels, **kwargs)

    def token_metrics(
        self, hidden_TBM: Tensor, weight: Tensor | None, labels_BT: Tensor, loss_mask_BT: Tensor | None
    ) -> Tensor:
        """What the last stage returns for labels. weight: of the output layer where it is the embedding's, or None."""
        raise NotImplementedError

    def _postprocess(self, hidden_states, labels=None, loss_mask=None, **kwargs):
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return self.token_metrics(hidden_states, weight, labels, loss_mask)


class GatedTransformerLayer(TransformerLayer):
    """A TransformerLayer that is given gates: `gated_forward` is called in place of `forward`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Megatron's arguments, handed on by their meaning."""
        return self.gated_forward(
            hidden_states, gates=context, spans=context_mask, documents=attention_mask, **kwargs
        )

    def gated_forward(self, hidden_states: Tensor, *, gates, spans, documents, **kwargs):
        """Hidden states, and the gates for the next layer."""
        raise NotImplementedError

    def plain_forward(
        self, hidden_states: Tensor, *, gate: Gate | None, documents: Tensor | None, **kwargs
    ) -> Tensor:
        """Megatron's layer with that gate at its attention; hidden states."""
        if gate is not None:
            kwargs["attention_bias"] = gate
        hidden_states, _ = TransformerLayer.forward(
            self, hidden_states=hidden_states, attention_mask=documents, context=None, **kwargs
        )
        return hidden_states


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
        attention_bias: Gate | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        def replayed(query, key, value, documents, gate):
            bias = None if gate is None else replace(attention_bias, gate=gate)
            return self.core_attention(
                query, key, value, documents, attention_bias=bias, packed_seq_params=packed_seq_params
            )

        gate = None if attention_bias is None else attention_bias.gate
        return tensor_parallel.checkpoint(replayed, False, query, key, value, attention_mask, gate)


class GatedCoreAttentionBase(MegatronModule):
    """A core attention that is given a gate: `attend` is called with Megatron's arguments by their meaning."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type=None,
        attention_bias: Gate | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """[T, 2B, H, D], [T, 2B, G, D] twice → [T, 2B, H·D]."""
        if packed_seq_params is not None:
            raise ValueError(
                "packed_seq_params: packed documents come as their boundaries (engine.paired_model)"
            )
        return self.attend(query, key, value, gate=attention_bias, documents=attention_mask)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, gate: Gate | None, documents: Tensor | None
    ) -> Tensor:
        raise NotImplementedError
