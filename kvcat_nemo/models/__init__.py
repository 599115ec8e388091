"""Hugging Face model folders, read in one place: config.json, rope, weight files, and loading with transformers.

Every command reads a model through this room. What the room cannot read in one way only, it refuses.
"""
