"""kvcat-nemo: continued pretraining that makes a language model's KV cache compressible (KV-CAT, arXiv 2605.05971)."""

__version__ = "0.1.0"
