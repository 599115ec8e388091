"""A stream of synthetic windows with exact resume, for kvcat_tiny and tests."""

from typing import Any

import lightning.pytorch as pl
import torch
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.io import IOMixin
from torch.utils.data import Dataset

from kvcat_nemo.data.run_order import FORMAT, RECALL
from kvcat_nemo.nemo.data_order import STATE, KeepsOrder, OnChange
from kvcat_nemo.nemo.numbered import NumberedDataset, PairedDataSampler


class RecallDataset(Dataset):
    """Windows in which late tokens repeat early ones: key–value pairs, then the keys asked again in another order.

    Predicting the second half needs the KV slots of the first, so compressing them costs something. Window i is drawn
    from seed and i alone. In `documents` parts of about equal length positions begin anew, as if each were a document.
    """

    def __init__(self, size: int, seq_length: int, vocab_size: int, seed: int, documents: int = 1):
        self.size, self.seq_length, self.vocab_size, self.seed = size, seq_length, vocab_size, seed
        self.documents = documents

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        pairs, half = (self.seq_length + 2) // 4, self.vocab_size // 2
        keys = (
            torch.randperm(half, generator=rng)[:pairs]
            if half >= pairs
            else torch.randint(half, (pairs,), generator=rng)
        )
        values = torch.randint(half, self.vocab_size, (pairs,), generator=rng)
        again = torch.randperm(pairs, generator=rng)
        stream = [torch.stack([keys, values], 1), torch.stack([keys[again], values[again]], 1)]
        tokens = torch.cat(stream).flatten()
        tokens = tokens.repeat(-(-(self.seq_length + 1) // len(tokens)))[: self.seq_length + 1]
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self.seq_length),
            "position_ids": torch.cat(
                [
                    torch.arange(len(part))
                    for part in torch.arange(self.seq_length).tensor_split(self.documents)
                ]
            ),
        }


class _NumberTokenizer:
    """Stands for a tokenizer where tokens are made as numbers."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.eos_id = 0


class SyntheticDataModule(KeepsOrder, pl.LightningDataModule, IOMixin):
    """Endless `RecallDataset` windows; needs no file. For kvcat_tiny and tests.

    packed_documents: windows are cut into three documents, which see nothing of one another. on_change: as KVCatDataModule's.
    """

    def __init__(
        self,
        seq_length: int = 64,
        vocab_size: int = 128,
        micro_batch_size: int = 2,
        global_batch_size: int = 4,
        seed: int = 1234,
        packed_documents: bool = False,
        on_change: OnChange = "refuse",
    ):
        super().__init__()
        self.packed_documents, self.on_change = packed_documents, on_change
        self._check_sizes(
            seq_length=seq_length,
            vocab_size=vocab_size,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
        )
        self.tokenizer = _NumberTokenizer(self.vocab_size)
        self.data_sampler = PairedDataSampler(
            seq_len=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
        )

    def describe_order(self, trainer) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "index": RECALL,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "vocab_size": self.vocab_size,
            "global_batch_size": self.global_batch_size,
            "validation_windows": max(int(trainer.limit_val_batches), 1) * self.global_batch_size,
            "packed_documents": bool(self.packed_documents),
        }

    def setup(self, stage: str = "") -> None:
        self.check_run(self.trainer)

    def _loader(self, mode: str, size: int, seed: int) -> WrappedDataLoader:
        self.data_sampler.init_global_step = self.trainer.global_step
        documents = 3 if self.packed_documents else 1
        dataset = RecallDataset(size, self.seq_length, self.vocab_size, seed, documents)
        numbered = NumberedDataset(dataset, self.packed_documents)
        return WrappedDataLoader(mode=mode, dataset=numbered, num_workers=0)

    def train_dataloader(self) -> WrappedDataLoader:
        return self._loader("train", max(self.windows_needed(), self.global_batch_size), self.seed)

    def val_dataloader(self) -> WrappedDataLoader:
        batches = self.trainer.limit_val_batches
        return self._loader("validation", max(int(batches), 1) * self.global_batch_size, self.seed + 1)

    def state_dict(self) -> dict[str, Any]:
        """Windows consumed and their order, so that a resumed run continues with the next window."""
        steps = self.trainer.global_step - self.data_sampler.init_global_step
        consumed = self.data_sampler.compute_consumed_samples(steps)
        return {"consumed_samples": consumed, STATE: self.order_record()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (
            STATE in state_dict
        ):  # of an old run the windows are the same: each is made of the seed and its number
            self._keep_order(state_dict[STATE])
        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
