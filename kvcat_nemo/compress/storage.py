"""Caches on disk: what the rest of the project calls (the format: cache_file.py)."""

from __future__ import annotations

from pathlib import Path

import torch

from kvcat_nemo.compress.cache import KVCache
from kvcat_nemo.compress.cache_file import FORMAT, check_target

__all__ = ["FORMAT", "check_target", "load", "save"]


def save(cache: KVCache, path: str | Path) -> None:
    """Write a cache; see KVCache.save."""
    cache.save(path)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> KVCache:
    """Read a cache's file; see KVCache.load."""
    return KVCache.load(path, device=device)
