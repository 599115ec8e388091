"""The data module of tokenised Megatron datasets, with exact resume."""

import os
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from nemo.collections.common.tokenizers import AutoTokenizer
from torch.utils.data import Dataset

from kvcat_nemo.data.arrays import check_arrays
from kvcat_nemo.data.indexed_check import check_indexed
from kvcat_nemo.data.run_order import EPOCHS, FORMAT, check_parts, splits_of
from kvcat_nemo.data.window_counts import split_shares
from kvcat_nemo.engine.epochs import EpochDataset
from kvcat_nemo.nemo.base_model import tokenizer_dir
from kvcat_nemo.nemo.compat import WrapsDatasets, interval_of_one_validation
from kvcat_nemo.nemo.data_order import STATE, KeepsOrder, OnChange
from kvcat_nemo.nemo.numbered import NumberedDataset, PairedDataSampler
from kvcat_nemo.nemo.synthetic import RecallDataset, SyntheticDataModule

__all__ = [
    "KVCatDataModule",
    "NumberedDataset",
    "PairedDataSampler",
    "RecallDataset",
    "SyntheticDataModule",
    "dataset_paths",
]


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
        if _is_number(prefix):  # a weight in a list of weights and prefixes
            if not 0 < float(prefix) < float("inf"):
                raise ValueError(f"data.paths={paths!r}: weight {prefix}: give a positive number")
            continue
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


class KVCatDataModule(KeepsOrder, WrapsDatasets):
    """NeMo's pretraining data on Megatron's datasets, in an order that does not depend on the run's length.

    Windows are read epoch by epoch (engine.epochs), corpora without weights in the ratio of their tokens, and every
    validation reads the same windows. The order is kept in the run's checkpoints (nemo.data_order).

    Args:
        paths: see `dataset_paths`.
        base: a converted base model (its tokenizer is used), or None when `tokenizer` is given.
        tokenizer: a Hugging Face tokenizer folder, or a NeMo tokenizer; overrides the base's.
        seq_length: tokens of a window; micro_batch_size, global_batch_size: windows.
        packed_documents: a window's documents, of which each ends with the end-of-document token, see nothing of one
            another: attention, routers, sinks, positions and random masks begin anew at each. False: a window is one text.
        eod_mask_loss: leave out the loss where the input is an end-of-document token (its label is the next document's
            first token).
        on_change: what a resumed run does whose settings would put its windows into another order: `refuse`, or `say` so
            and take the new ones from there on.
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
        on_change: OnChange = "refuse",
    ):
        self.on_change = on_change
        self._check_sizes(
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if paths is None:
            raise ValueError("data.paths=None: give a folder made by kvcat data build, or dataset prefixes")
        if tokenizer is None:
            if base is None:
                raise ValueError("data.base=None: give a converted base model, or data.tokenizer=HF_DIR")
            tokenizer = tokenizer_dir(base)
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = AutoTokenizer(pretrained_model_name=str(tokenizer))
        split_shares(split)
        resolved = dataset_paths(paths)
        super().__init__(
            paths=resolved,
            tokenizer=tokenizer,
            seq_length=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            seed=self.seed,
            split=split,
            index_mapping_dir=index_mapping_dir,
            reset_position_ids=packed_documents,
            reset_attention_mask=packed_documents,  # no mask is made of it, see below
            eod_mask_loss=eod_mask_loss,
        )
        self.base, self.paths, self.packed_documents = base, paths, packed_documents
        self._index_folders = index_folders(resolved, index_mapping_dir)
        self.data_sampler = PairedDataSampler(
            seq_len=self.seq_length,
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.global_batch_size,
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
        """As NeMo's, but epoch by epoch, and of the validation set so many windows as a single validation reads."""
        check_arrays(self._index_folders)
        steps = max(trainer_max_steps, (self.num_train_samples or 0) // self.global_batch_size)
        once = interval_of_one_validation(steps)
        self._limits = (trainer_limit_val_batches, trainer_limit_test_batches)
        given, self.dataset_cls = self.build_kwargs, GPTDataset
        if self._index == EPOCHS:
            self.dataset_cls, self.build_kwargs = EpochDataset, self._weighted()
        try:
            super().build(trainer_max_steps, once, *self._limits)
        finally:
            self.build_kwargs = given

    def _weighted(self) -> dict[str, Any]:
        """What Megatron is given, with training corpora that have no weights in the ratio of their tokens.

        Without weights it reads one epoch and has no more; with its own (windows of one epoch) they would depend on seq_length.
        """
        out = dict(self.build_kwargs)

        def weigh(blend):
            paths, weights = blend
            if weights is None and len(paths) > 1:
                weights = [float(check_indexed(path).tokens) for path in paths]
            return paths, weights

        if "blend" in out:
            out["blend"] = weigh(out["blend"])
        else:
            out["blend_per_split"] = [weigh(out["blend_per_split"][0]), *out["blend_per_split"][1:]]
        return out

    def describe_order(self, trainer) -> dict[str, Any]:
        limit = trainer.limit_val_batches
        part = isinstance(limit, float) and 0 < limit <= 1  # of one epoch
        windows = {
            "train": trainer.max_steps * self.global_batch_size,
            "validation": None if part else int(limit * self.global_batch_size),
            "test": int((trainer.limit_test_batches or 0) * self.global_batch_size),
        }
        given = self._weighted() if self._index == EPOCHS else self.build_kwargs
        splits = splits_of(given.get("blend"), given.get("blend_per_split"), self.split)
        if splits["train"] is None:
            raise ValueError(
                f"data.split={self.split!r}: no document is left for training; give train a weight"
            )
        check_parts(splits, windows, self.seq_length)
        return {
            "format": FORMAT,
            "index": self._index,
            "seed": self.seed,
            "seq_length": self.seq_length,
            "split": None if "blend_per_split" in given else str(self.split),
            "train": splits["train"],
            "validation": splits["validation"],
            "train_windows": windows["train"],
            "validation_windows": limit if part else windows["validation"],
            "global_batch_size": self.global_batch_size,
            "packed_documents": bool(self.packed_documents),
            "eod_mask_loss": bool(self.eod_mask_loss),
            "eod": _eod(self.tokenizer),
        }

    def setup(self, stage: str = "") -> None:
        self.check_run(self.trainer)
        super().setup(stage)

    def train_dataloader(self):
        needed = self.windows_needed()
        if self.train_windows < needed and self.trainer.global_step < self.trainer.max_steps:
            # The batch was larger once: the steps to come reach further than max_steps × global_batch_size.
            self.num_train_samples = needed
            self.build(self.trainer.max_steps, None, *self._limits)
        return super().train_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {STATE: self.order_record()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        index = self._index
        self._keep_order(state_dict.get(STATE))
        if self._index != index:  # an old run: what was built is in the other order
            self.build(self.trainer.max_steps, None, *self._limits)
        super().load_state_dict(state_dict)

    def wrap_dataset(self, dataset: Dataset) -> Dataset:
        return NumberedDataset(dataset, self.packed_documents)


def _eod(tokenizer) -> int | None:
    try:
        return int(tokenizer.eod)
    except (AttributeError, NotImplementedError, TypeError):
        return None
