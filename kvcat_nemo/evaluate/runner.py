"""Runs the items of an evaluation in a fixed order, skipping what is on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from tqdm import tqdm

from kvcat_nemo.evaluate.results import Key, Store

Work = tuple[Key, str, Callable[[], dict]]
"""A key, the id of an item, and the function that measures it."""


def run_items(store: Store, work: Iterable[Work], *, total: int, description: str, seed: int = 0) -> None:
    """Measure every item that the store does not hold yet.

    Every item starts from a random state of its own (of `seed`, key and item), so that a resumed run draws what an
    unbroken one would. The progress bar counts items on disk as done and leaves them out of its rate.

    Args:
        work: items in the order they are to be measured; a generator may set up shared work between them.
        total: how many there are.
    """
    with tqdm(total=total, desc=description, unit="item", dynamic_ncols=True) as bar:
        for key, item, measure in work:
            if store.get(key, item) is None:
                torch.manual_seed(item_seed(seed, key, item))
                store.put(key, item, measure())
            else:
                bar.initial += 1
            bar.update()


def item_seed(seed: int, key: Key, item: str) -> int:
    """A seed that depends on the run's seed, the key and the item alone."""
    digest = hashlib.sha256(f"{seed}\n{key.id}\n{item}".encode()).digest()
    return int.from_bytes(digest[:6])


def set_threads(threads: int | None) -> int:
    """Let torch use that many threads (None: leave it); returns how many it uses."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


class Lazy:
    """Calls once, when first asked, and keeps the answer."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def __call__(self) -> Any:
        if not hasattr(self, "value"):
            self.value = self.function()
        return self.value
