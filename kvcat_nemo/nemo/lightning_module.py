"""The LightningModule of a paired pass, and the reduction of its micro-batches."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_batch_on_this_cp_rank
from nemo.collections import llm
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from kvcat_nemo.engine.batch_fingerprint import BatchFingerprint
from kvcat_nemo.engine.collectives import set_router_loss_scale
from kvcat_nemo.engine.paired_model import document_boundaries
from kvcat_nemo.engine.step import microbatch_loss
from kvcat_nemo.method.config import KVCatConfig


class KVCatLossReduction(MegatronLossReduction):
    """Micro-batch losses → the step's mean loss; the named parts stay in `token_sums` for the metrics callback."""

    def __init__(self, kvcat: KVCatConfig):
        super().__init__()
        self.kvcat = kvcat

    def forward(self, batch: dict[str, Tensor], forward_out: Tensor):
        """Token metrics [K, B, T] → (loss summed over tokens, number of tokens, sums to be reduced)."""
        loss, tokens, sums = microbatch_loss(forward_out, batch["loss_mask"], self.kvcat)
        return loss, tokens, {"token_sums": sums}

    def reduce(self, losses_reduced_per_micro_batch) -> Tensor:
        """Mean over the global batch's tokens of the anchor and distillation terms, weighted."""
        sums = torch.stack([micro["token_sums"] for micro in losses_reduced_per_micro_batch]).sum(0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
        loss = self.kvcat.anchor_weight * sums[0]
        if self.kvcat.paired:
            loss = loss + self.kvcat.distill_weight * sums[1]
        return loss / sums[-1]


class KVCatModel(llm.GPTModel):
    """NeMo's GPT module around the paired model; `config` is one of kvcat_nemo.nemo.model_configs."""

    def data_step(self, dataloader_iter) -> dict[str, Tensor]:
        """Next micro-batch on this rank's device. Every pipeline stage gets the tokens: random masks depend on them.

        Under context parallelism, this rank's two chunks of every window. With packed documents, their boundaries too.
        """
        item = next(dataloader_iter)
        batch = item[0] if isinstance(item, tuple) else item
        if "sample_id" in batch:
            self.samples.add(batch["sample_id"], batch["tokens"])
            self._check_tokens(batch)
        names = ("tokens", "position_ids", "labels", "loss_mask")
        out = {name: batch[name].cuda(non_blocking=True) for name in names}
        if "packed" in batch:
            out["documents"] = document_boundaries(out["position_ids"])
            return out
        return get_batch_on_this_cp_rank(out)

    def forward_step(self, batch: dict[str, Tensor]) -> Tensor:
        """One micro-batch through this pipeline stage."""
        set_router_loss_scale(self.config, get_num_microbatches())
        return self.module(
            batch["tokens"],
            batch["position_ids"],
            batch.get("documents"),
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )

    def _check_tokens(self, batch: dict[str, Tensor]) -> None:
        # A token beyond the vocabulary would be looked up in another rank's part of the table, and as a label it
        # would cost nothing: both go unnoticed.
        vocabulary = self.config.true_vocab_size or self.config.vocab_size
        low, high = batch["tokens"].aminmax()
        if vocabulary and not 0 <= int(low) <= int(high) < vocabulary:
            raise ValueError(
                f"window {batch['sample_id'].tolist()} of the data holds token {int(high if high >= vocabulary else low)}, the model's "
                f"vocabulary has {vocabulary}: the data files are damaged, or were made with another tokenizer. "
                "Check them: kvcat train doctor --data DIR"
            )

    @property
    def samples(self) -> BatchFingerprint:
        """Windows read since the last step; the metrics callback takes it."""
        if not hasattr(self, "_samples"):
            self._samples = BatchFingerprint()
        return self._samples

    @property
    def training_loss_reduction(self) -> KVCatLossReduction:
        if not hasattr(self, "_loss_reduction"):
            self._loss_reduction = KVCatLossReduction(self.config.kvcat)
        return self._loss_reduction

    @property
    def validation_loss_reduction(self) -> KVCatLossReduction:
        return self.training_loss_reduction
