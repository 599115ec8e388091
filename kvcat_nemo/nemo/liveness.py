"""The heartbeat of a NeMo run: it starts with the process group, and is asked when a collective fails."""

from typing import Optional

import lightning.pytorch as pl
from nemo.utils import logging

from kvcat_nemo.engine import rank_sync
from kvcat_nemo.engine.heartbeat import Heartbeat, connect, is_communication_error


class KVCatHeartbeat(pl.Callback):
    """Names the rank and host that died, on every other rank, and ends them (exit code 69, or the error itself).

    Args:
        interval: seconds between a rank's heartbeats.
        patience: seconds without one after which a rank counts as dead; longer than any pause of a whole process.
    """

    def __init__(self, interval: float = 5.0, patience: float = 60.0):
        if not 0 < interval < patience:
            raise ValueError(
                f"interval={interval!r}, patience={patience!r}: give 0 < interval < patience seconds"
            )
        self.interval, self.patience = interval, patience
        self._heartbeat: Optional[Heartbeat] = None

    def setup(self, trainer, pl_module, stage) -> None:
        if rank_sync.world_size() == 1 or self._heartbeat is not None:
            return
        self._heartbeat = Heartbeat(
            connect(self.patience),
            rank_sync.rank(),
            rank_sync.world_size(),
            interval=self.interval,
            patience=self.patience,
        )
        self._heartbeat.start()

    def teardown(self, trainer, pl_module, stage) -> None:
        if self._heartbeat is not None:
            self._heartbeat.stop()
            self._heartbeat = None

    def on_exception(self, trainer, pl_module, exception) -> None:
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is None:
            return
        if not is_communication_error(exception):
            heartbeat.report_own_failure(exception)
            return
        verdict = heartbeat.wait_for_verdict(self.patience + 3 * self.interval)
        logging.error(
            f"kvcat: {verdict or 'a collective failed, and every rank still has a heartbeat'}. This rank ends: {exception}"
        )
        heartbeat.stop()


KVCatLifeline = KVCatHeartbeat  # the name in records of older versions (nemo/old_names.py)
