"""The GPT model of a paired pass: [dense | masked] stacked on the batch dimension, one pipelined forward for both."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.engine.compat.gates import GatedGPTModel
from kvcat_nemo.engine.compat.output_layer import adopt
from kvcat_nemo.engine.output_layer import TokenLossOutputLayer
from kvcat_nemo.engine.step import token_loss_weights
from kvcat_nemo.kernels import WindowSplit
from kvcat_nemo.method.attention import document_positions
from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.spans import Spans


class KVCatGPTModel(GatedGPTModel):
    """Megatron's GPT. With labels it runs the paired pass and returns per-token metrics; without, it is a plain GPT.

    Args:
        true_vocab_size: tokens of the tokenizer's vocabulary, without padding; None when there is none.
        others: as GPTModel's.
    """

    def __init__(self, config, *args, true_vocab_size: int | None = None, **kwargs):
        if config.kvcat.gate_policy.own_model and getattr(config, "kvdistill", None) is None:
            raise ValueError(
                f"kvcat.policy={config.kvcat.policy!r}: only a KV-Distill model makes these gates; give another policy"
            )
        super().__init__(config, *args, **kwargs)
        self.true_vocab_size = true_vocab_size or self.vocab_size
        if self.post_process:
            adopt(self.output_layer, TokenLossOutputLayer)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """One forward pass of this pipeline stage.

        Args:
            input_ids, position_ids, labels: [B, T]; under context parallelism this rank's tokens of each window.
                Every pipeline stage needs input_ids: a policy may draw its gates from them.
            attention_mask: boundaries of documents packed into the windows (`document_boundaries`); None: a window is one
                document. Attention, routers, sinks and random masks begin anew at each. Rotary positions count through the
                window: only their differences matter.
            loss_mask (among the others): [B, T], 1 where a token counts. It changes no result: given it, the gradients
                of `microbatch_loss` are there after one sweep over the vocabulary; without, backward sweeps again.

        Returns:
            last stage: token metrics [4 or 1, B, T] (kernels.losses.token_loss.token_losses) with labels, logits [B, T, V]
            without; other stages: hidden states [T, 2B or B, M].
        """
        kvcat: KVCatConfig = self.config.kvcat
        if attention_mask is not None and attention_mask.dim() != 1:
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)}: attention is causal; give the boundaries of documents, "
                "[n + 1], or None"
            )
        if labels is None or not kvcat.paired:
            return self.run(input_ids, position_ids, documents=attention_mask, labels=labels, **kwargs)
        gates, spans = initial_gates(
            kvcat, input_ids, WindowSplit.over(self.pg_collection.cp), attention_mask
        )
        twice = (x.repeat(2, 1) for x in (input_ids, position_ids))
        return self.run(*twice, documents=attention_mask, labels=labels, gates=gates, spans=spans, **kwargs)

    def token_metrics(
        self, hidden_TBM: Tensor, weight: Tensor | None, labels_BT: Tensor, loss_mask_BT: Tensor | None
    ) -> Tensor:
        """kernels.losses.token_loss.token_losses of this batch, [4 or 1, B, T]."""
        kvcat: KVCatConfig = self.config.kvcat
        return self.output_layer(
            hidden_TBM,
            weight,
            labels_BT=labels_BT,
            vocab_size=self.true_vocab_size,
            paired=kvcat.paired,
            temperature=kvcat.distill_temperature,
            forward_share=kvcat.distill_forward_share,
            loss_weights=None if loss_mask_BT is None else token_loss_weights(loss_mask_BT, kvcat),
            memory_mib=kvcat.loss_memory_mib,
            kernel=kvcat.loss_kernel,
        )


def document_boundaries(position_ids: Tensor) -> Tensor:
    """Boundaries 0 … B·T of the documents in B windows laid end to end, [n + 1] int32.

    Args:
        position_ids: [B, T], 0 where a document begins, as Megatron's GPTDataset gives them with reset_position_ids.

    Raises:
        ValueError: when a window does not begin with a 0.
    """
    begins = position_ids == 0
    if position_ids.device.type == "cpu" and not begins[:, 0].all():
        raise ValueError("position_ids: every window must begin with position 0")
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([position_ids.numel()])]).to(torch.int32)


def initial_gates(
    kvcat: KVCatConfig, input_ids: Tensor, split: WindowSplit | None = None, documents: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gates that enter the first layer of a stage, and the rows that they apply to.

    Args:
        split: input_ids are this rank's tokens of split windows; documents: as `document_boundaries` gives them.

    Returns:
        [R, B, T] of a policy that reads tokens, else a placeholder of ones; and with mask_span=prefix method.spans' table, on
        the CPU, for which a GPU is waited for.
    """
    B, T = input_ids.shape
    policy = kvcat.gate_policy
    if not policy.reads_tokens:
        return torch.ones(1, B, T, device=input_ids.device), None
    if split is not None:
        input_ids = split.whole(input_ids)  # a slot's gate depends on the window up to it
    position_BT = None
    if documents is not None:
        position_BT = document_positions(input_ids.numel(), documents)[0].view(input_ids.shape)
    gates_RBT, cut_BT = policy.window_gates(kvcat, input_ids, position_BT)
    spans = None
    if kvcat.masks_prefix:
        cuts = [row.nonzero()[:, 0].tolist() for row in cut_BT.cpu()]
        spans = Spans.from_cuts(cuts, T, documents).table()
    if split is not None:
        gates_RBT = torch.stack([split.own(gate) for gate in gates_RBT])
    return gates_RBT, spans
