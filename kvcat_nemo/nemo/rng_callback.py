"""Every rank's random state: kept from step to step, saved, and put back where a run is resumed."""

from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from nemo.utils import logging

from kvcat_nemo.engine import rank_sync
from kvcat_nemo.engine.rng_state import capture, digest, from_row, restore, row_width, to_row

_KEY = "kvcat.random_state"


class KVCatRandomState(pl.Callback):
    """Training draws from a stream of its own: what happens between two steps (validation, a save, making a data
    loader's iterator) does not move it, so that a resumed run draws what the unbroken one drew."""

    def __init__(self):
        self.state: Optional[torch.Tensor] = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.state is not None:
            restore(self.state)

    def on_train_batch_end(self, trainer, *args, **kwargs) -> None:
        self.state = capture()

    def digest(self) -> int:
        """A number of this rank's state after the last step."""
        return digest(self.state) if self.state is not None else 0


def random_state_callback(trainer) -> Optional[KVCatRandomState]:
    return next((c for c in trainer.callbacks if isinstance(c, KVCatRandomState)), None)


def random_state_entry(trainer) -> dict[str, Any]:
    """What to add to a checkpoint: one row of bytes per rank."""
    callback = random_state_callback(trainer)
    if callback is None or callback.state is None:
        return {}
    width = max(rank_sync.gather(row_width(callback.state)))
    row = to_row(callback.state, width)
    return {_KEY: _sharded(row, rank_sync.world_size())}


def load_random_state(trainer, weights: Path) -> None:
    """Give each rank its state back; where the number of ranks has changed, say that they keep their seeds' state."""
    callback = random_state_callback(trainer)
    stored = dist_checkpointing.load_tensors_metadata(str(weights)).get(_KEY)
    if callback is None or stored is None:
        return
    ranks, width = stored.global_shape
    if ranks != rank_sync.world_size():
        logging.warning(
            f"kvcat: the random states of {ranks} ranks do not fit {rank_sync.world_size()}: every rank starts from its seed. "
            "(Masks and data do not depend on it.)"
        )
        return
    wanted = {_KEY: _sharded(torch.zeros(1, width, dtype=torch.uint8), ranks)}
    callback.state = from_row(dist_checkpointing.load(wanted, str(weights))[_KEY].cpu())


def _sharded(row: torch.Tensor, ranks: int) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(_KEY, row, (0, rank_sync.rank(), ranks), replica_id=0)
