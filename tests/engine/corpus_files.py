"""Megatron datasets whose tokens are all different, so that a window says which of them it holds."""

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

S = 16
"""Tokens of a window."""


def write_corpus(prefix, lengths, first=0):
    """A dataset of documents of these lengths; its tokens are first, first + 1, …"""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in lengths:
        builder.add_item(torch.arange(first, first + length))
        builder.end_document()
        first += length
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


class Tokenizer:
    """What Megatron's datasets ask of one."""

    unique_identifiers = {"name": "numbers"}
    eod, pad = -5, -1


def build(kind, prefixes, windows, *, weights=None, split=None, seed=7, cache=None, seq_length=S):
    """The training set of that class with at least so many windows."""
    blend = (prefixes, weights)
    how = {"blend": blend, "split": split} if split else {"blend_per_split": [blend, None, None]}
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=seq_length, tokenizer=Tokenizer(), path_to_cache=cache,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, **how,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(kind, [windows, 0, 0], lambda: True, config).build()[0]


def tokens(dataset, start=0, stop=None):
    """[windows, S] of the windows start … stop − 1, in the order in which they are read."""
    return np.stack(
        [dataset[i]["tokens"].numpy() for i in range(start, len(dataset) if stop is None else stop)]
    )
