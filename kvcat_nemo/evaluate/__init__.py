"""Protocols that measure a model under a compressed KV cache; needs torch and transformers alone."""
