"""Hugging Face ↔ Megatron: one weight map per architecture, streamed both ways, and the proof that nothing changed."""
