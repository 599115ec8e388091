"""The GPT model of a paired pass: [dense | masked] stacked on the batch dimension, one pipelined forward for both."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from kvcat_nemo.engine.parallel_loss import token_losses
from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.policies import prefix_ids, random_gate


class KVCatGPTModel(GPTModel):
    """Megatron's GPT. With labels it runs the paired pass and returns per-token metrics; without, it is a plain GPT.

    Args:
        true_vocab_size: tokens of the tokenizer's vocabulary, without padding; None when there is none.
        others: as GPTModel's.
    """

    def __init__(self, config, *args, true_vocab_size: int | None = None, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.true_vocab_size = true_vocab_size or self.vocab_size

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
            input_ids, position_ids, labels: [B, T].
                Every pipeline stage needs input_ids: the random policy draws from them.

        Returns:
            last stage: token metrics [4 or 1, B, T] (engine.parallel_loss.token_losses) with labels, logits [B, T, V]
            without; other stages: hidden states [T, 2B or B, M].
        """
        kvcat: KVCatConfig = self.config.kvcat
        if labels is None or not kvcat.paired:
            return super().forward(input_ids, position_ids, attention_mask, labels=labels, **kwargs)
        gates = initial_gates(kvcat, input_ids)
        twice = (x.repeat(2, 1) for x in (input_ids, position_ids))
        return super().forward(
            *twice, attention_mask, labels=labels, extra_block_kwargs={"context": gates}, **kwargs
        )

    def _postprocess(self, hidden_states, labels=None, **kwargs):
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits, _ = self.output_layer(hidden_states, weight=weight)
        kvcat: KVCatConfig = self.config.kvcat
        return token_losses(
            logits,
            labels,
            vocab_size=self.true_vocab_size,
            group=self.pg_collection.tp,
            paired=kvcat.paired,
            temperature=kvcat.distill_temperature,
        )


def initial_gates(kvcat: KVCatConfig, input_ids: Tensor) -> Tensor:
    """Gates that enter the first layer of a stage: [R, B, T] draws of the random policy, else a placeholder of ones."""
    B, T = input_ids.shape
    if kvcat.policy != "random":
        return torch.ones(1, B, T, device=input_ids.device)
    ids = prefix_ids(input_ids)
    draws = [
        random_gate(ids, keep=kvcat.target_keep_fraction, seed=kvcat.seed, group=group)
        for group in range(kvcat.num_groups)
    ]
    return torch.stack(draws)
