"""The GPT model of KV-Distill: [teacher | student] stacked on the batch dimension, one pipelined forward for both.

Of a student's window the context's rows go through adapted weights and see each other whole; the other rows go through the
frozen weights and see the context's slots through their gates (method.kvdistill). So both of the paper's student passes are one.
The scores come from a pass of the first η layers of the frozen model, without gradients, on the first pipeline stage.

Between pipeline stages the gates travel with the hidden states, as one more row of the batch: its first B numbers of a token
are the gates of that token in the B windows.

Shapes: T tokens, P of this rank's part (sequence parallelism), B windows, M model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcat_nemo.engine.collectives import copy_to_tensor_parallel, gather_sequence
from kvcat_nemo.engine.paired_model import KVCatGPTModel
from kvcat_nemo.method.kvdistill import KVDistillConfig, Scorer, choose, draw_keep_fraction, slot_gates
from kvcat_nemo.method.kvdistill.selection import always_kept, kept_tokens
from kvcat_nemo.method.random_draws import prefix_ids
from kvcat_nemo.method.spans import Spans

SMALLEST_GATE = 1e-30
"""A chosen slot's gate is no smaller: 0 says that a slot was not chosen."""


def batch_rows(windows: int) -> int:
    """Rows of the hidden states that pipeline stages exchange, for a micro-batch of so many windows."""
    return 2 * windows + 1


class KVDistillGPTModel(KVCatGPTModel):
    """Trains adapters and scorer; every other parameter is frozen.

    `config.kvdistill` has the method's settings; `config.kvcat` the paired pass', with the policy `scorer`.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        distill: KVDistillConfig = config.kvdistill
        distill.check_layers(config.num_layers)
        self.scorer = None
        if self.pre_process:
            if len(self.decoder.layers) < distill.scorer_layer:
                raise ValueError(
                    f"kvdistill.scorer_layer={distill.scorer_layer}: the first pipeline stage has"
                    f" {len(self.decoder.layers)} layers, and the scorer reads there; give at most so many, or fewer stages"
                )
            self.scorer = Scorer(config.hidden_size, distill)
            for parameter in self.scorer.parameters():
                parameter.sequence_parallel = config.sequence_parallel
        for name, parameter in self.named_parameters():
            parameter.requires_grad = is_trained(name)
        self._arrived: Tensor | None = None
        """What the stage before sent: hidden states, and in a labelled pass the gates as their last row."""

    def set_input_tensor(self, input_tensor) -> None:
        """Megatron's; of a labelled pass, `forward` takes the gates off."""
        parts = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        self._arrived = parts[0]
        super().set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        context_lengths: Tensor | None = None,
        whole_BT: Tensor | None = None,
        example_ids: Tensor | None = None,
        kept_B: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """One forward pass of this pipeline stage.

        Args:
            input_ids, position_ids, labels: [B, T]; attention_mask: None, a window is one example.
            context_lengths: [B], tokens of each window's context, which it begins with; 1 … T − 1.
            whole_BT: bool, context tokens that must stay, besides the first `always_keep`; None: none.
            example_ids: [B] int64, from which the kept fractions are drawn; None: a number made from the tokens.
            kept_B: [B], tokens that stay; None: as many as the drawn fraction says.

        Returns:
            as KVCatGPTModel's: token metrics with labels, of which the KL is that of rows behind the context.
        """
        if attention_mask is not None:
            raise ValueError(
                "attention_mask: KV-Distill takes one example a window; packed documents are not supported"
            )
        if labels is None:
            return super().forward(input_ids, position_ids, labels=None, **kwargs)
        if context_lengths is None:
            raise ValueError("context_lengths: KV-Distill needs the length of each window's context")
        B, T = input_ids.shape
        lengths = context_lengths.to(input_ids.device)
        if bool(((lengths < 1) | (lengths >= T)).any()):
            raise ValueError(f"context_lengths {lengths.tolist()}: give 1 … {T - 1} in windows of {T} tokens")
        most = self.config.kvdistill.context_window
        if bool((lengths > most).any()):
            raise ValueError(
                f"context_lengths {lengths.tolist()}: above kvdistill.context_window={most}, and longer contexts are not folded in training"
            )
        spans = Spans.from_cuts(lengths[:, None], T)
        if self.pre_process:
            embedded = self.embedding(input_ids=input_ids, position_ids=position_ids)
            score_BP = self.scorer(self._plain_hidden(embedded).transpose(0, 1))
            gate_BP = self._gates(score_BP, input_ids, lengths, whole_BT, example_ids, kept_B, embedded.dtype)
            kwargs["decoder_input"] = torch.cat([embedded, embedded], 1)
        else:
            super().set_input_tensor([self._arrived[:, :-1].contiguous()])
            gate_BP = self._arrived[:, -1, :B].T
        whole = gather_sequence if self._sequence_parallel else copy_to_tensor_parallel
        gate_BT = whole(gate_BP, self.pg_collection.tp)
        twice = (x.repeat(2, 1) for x in (input_ids, position_ids))
        out = self.run(
            *twice, documents=None, labels=labels, gates=gate_BT[None], spans=spans.table(), **kwargs
        )
        return out if self.post_process else self._with_gates(out, gate_BP)

    @property
    def _sequence_parallel(self) -> bool:
        return self.config.sequence_parallel and self.pg_collection.tp.size() > 1

    @torch.no_grad()
    def _plain_hidden(self, embedded_PBM: Tensor) -> Tensor:
        """Hidden states behind the first η layers of the frozen model."""
        ranks = self.pg_collection.tp.size() if self._sequence_parallel else 1
        angles = self.rotary_pos_emb(embedded_PBM.shape[0] * ranks)
        h = embedded_PBM
        for layer in self.decoder.layers[: self.config.kvdistill.scorer_layer]:
            h, _ = layer(hidden_states=h, attention_mask=None, rotary_pos_emb=angles)
        return h

    def _gates(self, score_BP, input_ids, lengths, whole_BT, example_ids, kept_B, dtype) -> Tensor:
        """This rank's part of the gates, [B, P]. The choice is made from the scores of whole windows, the same on every rank."""
        distill: KVDistillConfig = self.config.kvdistill
        score_BT = score_BP.detach()
        if self._sequence_parallel:
            score_BT = gather_sequence(score_BT, self.pg_collection.tp)
        context = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        must = always_kept(context, distill.always_keep)
        if whole_BT is not None:
            must = must | (whole_BT & context)
        if kept_B is None:
            ids = prefix_ids(input_ids)[:, -1] if example_ids is None else example_ids
            drawn = draw_keep_fraction(
                ids, keep_min=distill.keep_min, keep_max=distill.keep_max, seed=distill.seed
            )
            kept_B = kept_tokens(drawn, context)
        chosen = choose(score_BT, context, kept_B, must)
        if self._sequence_parallel:
            group = self.pg_collection.tp
            chosen, must = (x.chunk(group.size(), 1)[group.rank()] for x in (chosen, must))
        gate = slot_gates(score_BP, chosen, must, dropped_gradient=distill.dropped_slot_gradient)
        return torch.where(chosen, gate.clamp(min=max(SMALLEST_GATE, torch.finfo(dtype).tiny)), gate).to(
            dtype
        )

    def _with_gates(self, hidden_PXM: Tensor, gate_BP: Tensor) -> Tensor:
        """Hidden states for the next stage, and the gates as their last row."""
        M, B = hidden_PXM.shape[2], gate_BP.shape[0]
        if B > M:
            raise ValueError(
                f"micro_batch_size={B}: above the model's width, {M}; gates travel in a row of it"
            )
        row = torch.nn.functional.pad(gate_BP.T.to(hidden_PXM.dtype), (0, M - B))
        return torch.cat([hidden_PXM, row[:, None]], 1)


def is_trained(name: str) -> bool:
    """Whether a parameter of that name is an adapter's or the scorer's; all others are the frozen base's."""
    return name.startswith("scorer.") or ".qkv_adapter." in name or ".output_adapter." in name
