"""Data modules: tokenised Megatron datasets with exact resume, and a synthetic stream for tests."""

import dataclasses
import os
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from nemo.lightning.data import WrappedDataLoader
from nemo.lightning.io import IOMixin
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import Dataset

from kvcat_nemo.data.arrays import check_arrays
from kvcat_nemo.data.indexed_check import check_indexed
from kvcat_nemo.nemo.base import tokenizer_dir


def dataset_paths(paths) -> dict[str, list[str]] | list[str]:
    """What `data.paths` means.

    Args:
        paths: a folder that `kvcat data build` wrote (train and held-out parts), a dataset prefix (FILE.bin/.idx
            without the ending), a list of prefixes or of alternating weights and prefixes, or a dict
            {train, validation, test} of those.

    Raises:
        ValueError: when a file is missing, naming it and how to make it.
    """
    # Megatron keeps its indices in a folder named as the prefix: after the first run both are there.
    is_prefix = isinstance(paths, str | os.PathLike) and Path(f"{paths}.idx").is_file()
    if isinstance(paths, str | os.PathLike) and Path(paths).is_dir() and not is_prefix:
        folder = Path(paths)
        train, held = str(folder / "train"), str(folder / "heldout")
        out: dict[str, list[str]] | list[str] = {"train": [train], "validation": [held], "test": [held]}
    elif isinstance(paths, dict):
        out = {
            name: [str(v)] if isinstance(v, str | os.PathLike) else [str(x) for x in v]
            for name, v in paths.items()
        }
        out.setdefault("test", out.get("validation", []))
        for name in ("train", "validation"):
            if not out.get(name):
                raise ValueError(f"data.paths={paths!r}: the dict needs train and validation")
    else:
        out = [str(paths)] if isinstance(paths, str | os.PathLike) else [str(x) for x in paths]
    parts = out.values() if isinstance(out, dict) else [out]
    for prefix in dict.fromkeys(p for part in parts for p in part):
        if _is_number(prefix):
            continue  # a weight in a list of weights and prefixes
        try:
            check_indexed(prefix)
        except ValueError as error:
            raise ValueError(
                f"data.paths={paths!r}: {error}. Build a dataset: "
                "kvcat data build SOURCE --tokenizer HF_DIR --out DIR, and give DIR"
            ) from None
    return out


def index_folders(paths, index_mapping_dir) -> list[str]:
    """Where Megatron keeps the sample indices of a dataset, and takes those that it finds."""
    if index_mapping_dir:
        return [str(index_mapping_dir)]
    parts = paths.values() if isinstance(paths, dict) else [paths]
    return [f"{prefix}/cache" for part in parts for prefix in part if not _is_number(prefix)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class PairedDataSampler(MegatronDataSampler):
    """Tells the schedule how many windows travel between pipeline stages: of a paired batch, twice a micro-batch's."""

    def on_megatron_step_start(self, step):
        step = super().on_megatron_step_start(step)
        windows = self.micro_batch_size * (2 if step.pl_module.config.kvcat.paired else 1)
        return dataclasses.replace(step, micro_batch_size=windows)


class NumberedDataset(Dataset):
    """A dataset whose items carry their number (`sample_id`), so that a run can say which windows it has seen.

    Those of packed documents say so (`packed`): of the models of interleaved stages only the first knows its trainer.
    """

    def __init__(self, dataset: Dataset, packed: bool = False):
        self.dataset, self.packed = dataset, packed
        if hasattr(dataset, "collate_fn"):
            self.collate_fn = dataset.collate_fn

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {**self.dataset[index], "sample_id": torch.tensor(index)}
        return item | {"packed": torch.tensor(True)} if self.packed else item


class KVCatDataModule(PreTrainingDataModule):
    """NeMo's pretraining data on Megatron's GPTDataset, with the same validation windows at every validation.

    Args:
        paths: see `dataset_paths`.
        base: a converted base model (its tokenizer is used), or None when `tokenizer` is given.
        tokenizer: a Hugging Face tokenizer folder, or a NeMo tokenizer; overrides the base's.
        seq_length: tokens of a window; micro_batch_size, global_batch_size: windows.
        packed_documents: a window's documents, of which each ends with the end-of-document token, see nothing of one
            another: attention, routers, sinks, positions and random masks begin anew at each. False: a window is one text.
        eod_mask_loss: leave out the loss where the input is an end-of-document token (its label is the next document's
            first token).
        others: as NeMo's PreTrainingDataModule.
    """

    def __init__(
        self,
        paths: Any = None,
        base: Optional[str] = None,
        tokenizer: Any = None,
        seq_length: int = 1024,
        micro_batch_size: int = 1,
        global_batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 1234,
        split: str = "980,20,0",
        index_mapping_dir: Optional[str] = None,
        packed_documents: bool = False,
        eod_mask_loss: bool = False,
    ):
        if paths is None:
            raise ValueError("data.paths=None: give a folder made by kvcat data build, or dataset prefixes")
        if tokenizer is None:
            if base is None:
                raise ValueError("data.base=None: give a converted base model, or data.tokenizer=HF_DIR")
            tokenizer = tokenizer_dir(base)
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = AutoTokenizer(pretrained_model_name=str(tokenizer))
        resolved = dataset_paths(paths)
        super().__init__(
            paths=resolved,
            tokenizer=tokenizer,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            seed=seed,
            split=split,
            index_mapping_dir=index_mapping_dir,
            reset_position_ids=packed_documents,
            reset_attention_mask=packed_documents,  # no mask is made of it, see below
            eod_mask_loss=eod_mask_loss,
        )
        self.base, self.paths, self.packed_documents = base, paths, packed_documents
        self._index_folders = index_folders(resolved, index_mapping_dir)
        self.data_sampler = PairedDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )
        # Attention is causal by construction; NeMo would make a T×T mask per window where it finds no Transformer Engine.
        self.create_attention_mask = False

    def build(
        self,
        trainer_max_steps,
        trainer_val_check_interval,
        trainer_limit_val_batches,
        trainer_limit_test_batches,
    ):
        """As NeMo's, but the validation set is exactly one validation's windows, so that every validation sees the same."""
        check_arrays(self._index_folders)
        once = (
            trainer_max_steps + 1
        )  # "validate every so many steps": the set is then sized for a single validation
        super().build(trainer_max_steps, once, trainer_limit_val_batches, trainer_limit_test_batches)

    def _create_dataloader(self, dataset, mode, **kwargs) -> WrappedDataLoader:
        return super()._create_dataloader(NumberedDataset(dataset, self.packed_documents), mode, **kwargs)


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


class SyntheticDataModule(pl.LightningDataModule, IOMixin):
    """Endless `RecallDataset` windows; needs no file. For kvcat_tiny and tests.

    packed_documents: windows are cut into three documents, which see nothing of one another.
    """

    def __init__(
        self,
        seq_length: int = 64,
        vocab_size: int = 128,
        micro_batch_size: int = 2,
        global_batch_size: int = 4,
        seed: int = 1234,
        packed_documents: bool = False,
    ):
        super().__init__()
        self.packed_documents = packed_documents
        self.seq_length, self.vocab_size, self.seed = seq_length, vocab_size, seed
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.tokenizer = _NumberTokenizer(vocab_size)
        self.data_sampler = PairedDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def _loader(self, mode: str, size: int, seed: int) -> WrappedDataLoader:
        self.data_sampler.init_global_step = self.trainer.global_step
        documents = 3 if self.packed_documents else 1
        dataset = RecallDataset(size, self.seq_length, self.vocab_size, seed, documents)
        numbered = NumberedDataset(dataset, self.packed_documents)
        return WrappedDataLoader(mode=mode, dataset=numbered, num_workers=0)

    def train_dataloader(self) -> WrappedDataLoader:
        return self._loader("train", max(self.trainer.max_steps, 1) * self.global_batch_size, self.seed)

    def val_dataloader(self) -> WrappedDataLoader:
        batches = self.trainer.limit_val_batches
        return self._loader("validation", max(int(batches), 1) * self.global_batch_size, self.seed + 1)

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands, so that a resumed run goes on with the next window."""
        steps = self.trainer.global_step - self.data_sampler.init_global_step
        return {"consumed_samples": self.data_sampler.compute_consumed_samples(steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        consumed = state_dict["consumed_samples"]
        self.data_sampler.init_consumed_samples = consumed
        self.data_sampler.prev_consumed_samples = consumed
        self.data_sampler.if_first_step = 1
