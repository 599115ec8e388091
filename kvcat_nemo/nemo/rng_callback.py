"""Keeps every rank's random state from step to step, saves it, and restores it when a run is resumed."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from nemo.utils import logging

from kvcat_nemo.engine import rank_sync
from kvcat_nemo.engine.rng_state import capture, from_row, restore, row_width, to_row
from kvcat_nemo.nemo.run_state import RunCallback, RunState

_KEY = "kvcat.random_state"


class KVCatRandomState(RunCallback, pl.Callback):
    """Training draws from a stream of its own: what happens between two steps (validation, a save, making a data
    loader's iterator) does not move it, so that a resumed run draws what the unbroken one drew."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.run.random_state is not None:
            restore(self.run.random_state)

    def on_train_batch_end(self, trainer, *args, **kwargs) -> None:
        self.run.random_state = capture()


def random_state_entry(run: RunState) -> dict[str, Any]:
    """What to add to a checkpoint: one row of bytes per rank."""
    if run.random_state is None:
        return {}
    width = max(rank_sync.gather(row_width(run.random_state)))
    row = to_row(run.random_state, width)
    return {_KEY: _sharded(row, rank_sync.world_size())}


def load_random_state(run: RunState, weights: Path) -> None:
    """Give each rank its state back; where the number of ranks has changed, say that they keep their seeds' state."""
    stored = dist_checkpointing.load_tensors_metadata(str(weights)).get(_KEY)
    if stored is None:
        return
    ranks, width = stored.global_shape
    if ranks != rank_sync.world_size():
        logging.warning(
            f"kvcat: the random states of {ranks} ranks do not fit {rank_sync.world_size()}: every rank starts from its seed. "
            "(Masks and data do not depend on it.)"
        )
        return
    wanted = {_KEY: _sharded(torch.zeros(1, width, dtype=torch.uint8), ranks)}
    run.random_state = from_row(dist_checkpointing.load(wanted, str(weights))[_KEY].cpu())


def _sharded(row: torch.Tensor, ranks: int) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(_KEY, row, (0, rank_sync.rank(), ranks), replica_id=0)
