"""A GPTDataset whose windows come in an order of our own."""

from __future__ import annotations

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset

from kvcat_nemo.engine.compat import MEGATRON

MEGATRON.reach(
    GPTDataset, "_build_document_sample_shuffle_indices", "order windows epoch by epoch", takes=("self",)
)


class IndexedDataset(GPTDataset):
    """Megatron's, with the index that `window_index` gives."""

    def window_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document_index, sample_index, shuffle_index), as engine.epochs.Index describes them."""
        raise NotImplementedError

    def _build_document_sample_shuffle_indices(self):
        return self.window_index()
