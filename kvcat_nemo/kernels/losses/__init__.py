"""Cross-entropy and KL of a paired batch over the vocabulary, chunk by chunk."""
