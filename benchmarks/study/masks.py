"""Which tokens a trained router keeps: recorded on held-out windows, told by kind of token and layer group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

FILE = "masks.npz"
KINDS = ("word start", "inside a word", "digits", "punctuation", "white space")


class Recorder:
    """While entered, keeps the hard gates of every router of a model, [groups][call] → [B, T] or [B, T, KV heads]."""

    def __init__(self, model: torch.nn.Module):
        from kvcat_nemo.engine.layer import kvcat_layers

        self.routers = [layer.router for layer in kvcat_layers(model) if layer.router is not None]
        self.gates: list[list[np.ndarray]] = [[] for _ in self.routers]

    def __enter__(self) -> Recorder:
        def keep(kept: list) -> Callable:
            return lambda module, args, routing: kept.append(routing.hard_BT.bool().numpy())

        pairs = zip(self.routers, self.gates, strict=True)
        self._hooks = [router.register_forward_hook(keep(kept)) for router, kept in pairs]
        return self

    def __exit__(self, *unused) -> None:
        for hook in self._hooks:
            hook.remove()

    def write(self, path: Path, tokens: torch.Tensor) -> None:
        """The windows' tokens [N, T] and gates [groups, N, T(, KV heads)], for `structure`."""
        from kvcat_nemo.common.files import new_file

        gates = np.stack([np.concatenate(kept) for kept in self.gates])
        with new_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, tokens=tokens.numpy().astype(np.int32), gates=gates)


def kinds_of(pieces: list[str]) -> np.ndarray:
    """Index into KINDS for every token's text."""

    def kind(text: str) -> int:
        bare = text.strip()
        if not bare:
            return 4
        if any(c.isdigit() for c in bare):
            return 2
        if not any(c.isalpha() for c in bare):
            return 3
        return 0 if text[0].isspace() else 1

    return np.array([kind(piece) for piece in pieces])


def structure(path: Path, pieces: list[str]) -> dict[str, Any]:
    """Keep rates of a recorded run, one per layer group in each list.

    Args:
        pieces: text of every token id.
    """
    with np.load(path) as file:
        tokens, gates = file["tokens"], file["gates"].astype(np.float64)
    if gates.ndim == 4:
        gates = gates.mean(-1)
    kind = kinds_of(pieces)[tokens]
    T = tokens.shape[1]
    first = np.stack([np.isin(np.arange(T), np.unique(row, return_index=True)[1]) for row in tokens])
    parts = {name: kind == i for i, name in enumerate(KINDS)}
    parts |= {"first time in the window": first, "seen before in the window": ~first}
    edges = [0, 1, 4, 16, 64, T]
    place = np.broadcast_to(np.arange(T), tokens.shape)
    parts |= {
        f"slots {a} to {b - 1}" if b > a + 1 else f"slot {a}": (place >= a) & (place < b)
        for a, b in zip(edges, edges[1:], strict=False)
        if a < T
    }
    flat = gates.reshape(len(gates), -1)
    agreement = np.corrcoef(flat) if len(flat) > 1 else np.ones((1, 1))
    return {
        "windows": len(tokens),
        "kept": gates.mean((1, 2)).tolist(),
        "by_kind": {
            name: {"share": float(where.mean()), "kept": gates[:, where].mean(-1).tolist()}
            for name, where in parts.items()
            if where.any()
        },
        "correlation": np.nan_to_num(agreement).tolist(),
    }
