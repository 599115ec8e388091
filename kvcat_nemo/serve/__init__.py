"""Compressed caches in the engines that people serve with: transformers' `generate`, and vLLM."""

from kvcat_nemo.serve.document import Document, read_document
from kvcat_nemo.serve.generate import fork, inputs_for, load_cache

__all__ = ["Document", "fork", "inputs_for", "load_cache", "read_document"]
