"""Post-hoc compression of the KV cache of Hugging Face models: budgets in, smaller caches out."""

from kvcat_nemo.compress.budget import Budget
from kvcat_nemo.compress.cache import KVCache, LayerCache, stack_rows
from kvcat_nemo.compress.compressor import Compressed, Compressor, compress, select
from kvcat_nemo.compress.decode import extend, generate, next_logits, positions_after
from kvcat_nemo.compress.prefill import Prefilled, prefill
from kvcat_nemo.compress.registry import COMPRESSORS, make
from kvcat_nemo.compress.servable import Servable, compress_servable

__all__ = [
    "COMPRESSORS",
    "Budget",
    "Compressed",
    "Compressor",
    "KVCache",
    "LayerCache",
    "Prefilled",
    "Servable",
    "compress",
    "compress_servable",
    "extend",
    "generate",
    "make",
    "next_logits",
    "positions_after",
    "prefill",
    "select",
    "stack_rows",
]
