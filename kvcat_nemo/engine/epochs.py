"""The order of training windows, epoch by epoch: a longer run begins with exactly the windows of a shorter one.

Megatron's GPTDataset shuffles the documents of all epochs together, and the last one apart or not, by how many windows
were asked for. Another `max_steps` is then another order: a run that is extended reads some tokens three times and others
never. Here each epoch has an order of its own, drawn from the seed and the epoch's number, and the epochs follow one
another:

    stream      the documents of epoch 0, then those of epoch 1, …; each epoch's documents shuffled
    window k    tokens k·S … k·S + S of the stream (the last one is only a label): every token of an epoch is an input once
    epoch e     the windows that end in it, ⌊(e·N − 1)/S⌋ … ⌊((e + 1)·N − 1)/S⌋ − 1, shuffled among themselves

Epoch 0 is drawn as Megatron draws a single epoch, bit for bit: runs of at most one epoch are as they were.

Sizes: N tokens of an epoch, S tokens of a window, D documents.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kvcat_nemo.common.folders import new_folder
from kvcat_nemo.data.window_counts import INDEX_FOLDER, check_epochs, contents, epochs_needed, windows_in
from kvcat_nemo.engine.compat.dataset_index import IndexedDataset

PARTS = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True)
class Index:
    """What Megatron's GPTDataset reads windows by."""

    document_index: np.ndarray
    """[epochs · D] document of every place in the stream."""
    sample_index: np.ndarray
    """[windows + 1, 2] place in document_index, and offset in that document, where each window begins."""
    shuffle_index: np.ndarray
    """[windows] window of the stream that is read as number i."""


def build_index(lengths: np.ndarray, documents: np.ndarray, seq_length: int, epochs: int, seed: int) -> Index:
    """The index of so many whole epochs.

    Args:
        lengths: [all documents] tokens of each document; documents: [D] those that are read.
    """
    from megatron.core.datasets import helpers

    tokens = int(lengths[documents].sum(dtype=np.int64))
    order, shuffled, end = [], [], 0
    total = windows_in(epochs, tokens, seq_length)
    kind = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    for epoch in range(epochs):
        # Epoch 0 as Megatron's; the others from the seed and their number, whatever came before.
        random = np.random.RandomState(seed if epoch == 0 else [seed, epoch])
        mine = documents.astype(np.int32)  # a copy
        random.shuffle(mine)
        order.append(mine)
        begin, end = end, windows_in(epoch + 1, tokens, seq_length)
        windows = np.arange(begin, end, dtype=kind)
        random.shuffle(windows)
        shuffled.append(windows)
    order = np.concatenate(order)
    sizes = np.ascontiguousarray(lengths, dtype=np.int32)
    if not total:
        return Index(order, np.zeros((1, 2), np.int32), np.zeros(0, kind))
    sample_index = helpers.build_sample_idx(sizes, order, seq_length, epochs, tokens, True, True)
    return Index(order, sample_index, np.concatenate(shuffled))


class EpochDataset(IndexedDataset):
    """Megatron's GPTDataset with the order of `build_index`: whole epochs, at least `num_samples` windows of them.

    The index is kept, whole or not at all, in `path_to_cache` or beside the dataset, under a name made of everything that
    it depends on (the files' contents too, so that a dataset that was built anew gets an index of its own).

    Raises:
        ValueError: when the split has no token but windows are asked of it, or more epochs than `data.window_counts` allows.
    """

    def window_index(self):
        lengths = self.dataset.sequence_lengths
        tokens = int(lengths[self.indices].sum(dtype=np.int64))
        S, split = self.config.sequence_length, self.index_split.name
        if self.num_samples == 0:
            empty = np.zeros(0, np.int32)
            return empty, np.zeros((1, 2), np.int32), empty.astype(np.uint32)
        what = f"the {split} split of {self.dataset_path}"
        epochs = epochs_needed(self.num_samples, tokens, S, what=what)
        check_epochs(epochs, len(self.indices), what=what)
        facts = {
            "order": "epochs 1",
            "contents": contents(self.dataset_path),
            "documents": [int(self.indices[0]), int(self.indices[-1]) + 1],
            "seq_length": S,
            "seed": self.config.random_seed,
            "epochs": epochs,
        }
        self.unique_identifiers |= facts  # a blend's cached index is named after these
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        root = Path(self.config.path_to_cache or Path(self.dataset.path_prefix) / INDEX_FOLDER)
        folder = root / f"{type(self).__name__}-{split}-{name}"
        if not folder.is_dir():
            index = build_index(lengths, self.indices, S, epochs, self.config.random_seed)
            if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
                return tuple(
                    getattr(index, part) for part in PARTS
                )  # a disk of its own: rank 0's is not seen
            self._save(index, folder)
        # Mapped, so that the ranks of a node share one copy.
        return tuple(np.load(folder / f"{part}.npy", mmap_mode="r") for part in PARTS)

    @staticmethod
    def _save(index: Index, folder: Path) -> None:
        try:
            with new_folder(folder) as temporary:
                for part in PARTS:
                    np.save(temporary / f"{part}.npy", getattr(index, part))
        except ValueError:
            # Another run on the same data was faster: the name says the contents.
            if not all((folder / f"{part}.npy").is_file() for part in PARTS):
                raise
        except OSError as error:
            raise ValueError(
                f"data.index_mapping_dir: the order of the windows cannot be written to {folder.parent} "
                f"({error.strerror or error}); give a folder that this user may write, data.index_mapping_dir=DIR"
            ) from error
