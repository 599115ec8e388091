"""The compressors there are. A new one is a module with its class, and a line in `_ALL`.

How users write them: specification.py.
"""

from __future__ import annotations

from kvcat_nemo.compress.attention_matching import AttentionMatching
from kvcat_nemo.compress.baselines import Random, Recent
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.gradient import Gradient
from kvcat_nemo.compress.kivi import Int4, Int8
from kvcat_nemo.compress.kvdistill.compressor import KVDistill
from kvcat_nemo.compress.kvsculpt import KVSculpt
from kvcat_nemo.compress.rkv import RKV
from kvcat_nemo.compress.specification import COMPRESSORS, make

__all__ = ["COMPRESSORS", "kind_of", "make"]

_ALL: tuple[type[Compressor], ...] = (
    Random,
    Recent,
    AttentionMatching,
    KVSculpt,
    Gradient,
    RKV,
    KVDistill,
    Int8,
    Int4,
)
COMPRESSORS.update({kind.name: kind for kind in _ALL})


def kind_of(name: str) -> type[Compressor]:
    """The class behind a name of COMPRESSORS."""
    return COMPRESSORS[name]
