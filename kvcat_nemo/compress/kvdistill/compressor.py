"""`kv-distill:adapter=PATH`: keeps the tokens that a trained scorer chooses, encoded by the adapted model."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from kvcat_nemo.compress.cache import KVCache
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.fit import known_fingerprint
from kvcat_nemo.compress.kvdistill.adapter import CARD, WEIGHTS, Adapter, check_base, load_adapter
from kvcat_nemo.compress.kvdistill.encode import encode
from kvcat_nemo.compress.prefill import Prefilled


@dataclass
class KVDistill(Compressor):
    """KV-Distill (arXiv 2503.10337): the same tokens stay in every layer and head; the plain model decodes."""

    name: ClassVar[str] = "kv-distill"
    trained: ClassVar[bool] = True
    adapter: str = ""
    """Folder of the adapter."""
    allow_other_base: bool = False
    """Use an adapter of a model with the same shape and other weights."""

    def loaded(self) -> Adapter:
        """The adapter, read once.

        Raises:
            ValueError: when it is not given or cannot be read.
        """
        if not self.adapter:
            raise ValueError(
                "kv-distill: give its adapter, kv-distill:adapter=FOLDER (conversion/kvdistill.py writes one)"
            )
        folder = Path(self.adapter)
        times = tuple(
            (folder / name).stat().st_mtime_ns if (folder / name).exists() else 0 for name in (WEIGHTS, CARD)
        )
        return _loaded(self.adapter, times)

    @property
    def smallest(self) -> int:
        return max(1, self.loaded().config.always_keep) if self.adapter else 1

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        adapter, model = self.loaded(), prefilled.model
        check_base(adapter, model.config, known_fingerprint(model), allow_other=self.allow_other_base)
        return encode(model, prefilled.ids_BT[0], slots, adapter)


@functools.lru_cache(maxsize=2)
def _loaded(folder: str, times: tuple[int, ...]) -> Adapter:
    return load_adapter(folder)
