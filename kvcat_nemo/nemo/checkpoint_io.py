"""Writes and reads the files of a checkpoint as NeMo does, with hashes; a failure on one rank is raised on every rank."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import queue
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from nemo.lightning.ckpt_utils import ckpt_to_dir
from nemo.lightning.io.pl import MegatronCheckpointIO
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException

from kvcat_nemo.common.files import new_file
from kvcat_nemo.common.processes import die_with_parent
from kvcat_nemo.engine import rank_sync
from kvcat_nemo.nemo.compat import forget_save_plan, set_results_queue, use_common_writer
from kvcat_nemo.runs.checkpoint_manifest import contents, hash_files, owner
from kvcat_nemo.runs.layout import HASHES

SAVE_FAILED = (CheckpointException, rank_sync.AllRanksError)
"""What a save that failed raises on every rank. (torch's CheckpointException is no Exception.)"""


class _CommonSave(TorchCommonSaveStrategy):
    """What is not sharded is written by rank 0: its failure is everybody's, or the others would wait for ever."""

    def save_common(self, common_state_dict, checkpoint_dir) -> None:
        rank_sync.on_first_rank(
            lambda: super(_CommonSave, self).save_common(common_state_dict, checkpoint_dir)
        )


class KVCatCheckpointIO(MegatronCheckpointIO):
    """NeMo's Megatron checkpoints; the files' hashes are taken by the ranks that wrote them."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None
    ):
        """As NeMo's. With async_save the request also hashes what it has written, in the writer's process."""
        _prepare_results_queue(self.async_save)
        forget_save_plan(self)
        request = super().save_checkpoint(checkpoint, path, storage_options)
        if request is not None and request.async_fn is not None:
            folder, rank, world = str(ckpt_to_dir(path)), rank_sync.rank(), rank_sync.world_size()
            hashed = functools.partial(_write_then_hash, request.async_fn, folder, rank, world)
            request = request._replace(async_fn=hashed)
        return request


class KVCatAsyncIO(AsyncFinalizableCheckpointIO):
    """NeMo's asynchronous saving; a save that fails is handed to `on_failure` instead of ending the run there."""

    on_failure = None

    def maybe_finalize_save_checkpoint(self, blocking: bool = False):
        try:
            return super().maybe_finalize_save_checkpoint(blocking)
        except SAVE_FAILED as error:
            if self.on_failure is None:
                raise
            self.on_failure(error)
            return False


def make_checkpoint_io(**arguments):
    """The CheckpointIO of a run, wrapped for asynchronous saving where that is asked for."""
    use_common_writer(_CommonSave("torch", 1))
    plain = KVCatCheckpointIO(**arguments)
    return KVCatAsyncIO(plain) if arguments.get("async_save") else plain


def collect_hashes(folder: Path) -> dict[str, dict]:
    """Size and hash of every file of a checkpoint that has just been written. A collective call.

    Each rank answers for its own files. What an asynchronous writer hashed already is not read again.

    Raises:
        AllRanksError: on every rank, when one could not read its files.
    """
    me, world = rank_sync.rank(), rank_sync.world_size()
    sidecar = _sidecar(folder, me)
    answer: tuple[dict, str] = ({}, "")
    try:
        done = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
        sidecar.unlink(missing_ok=True)
        mine = [n for n in contents(folder) if owner(n, world) == me and HASHES not in n]
        answer = ({n: done[n] for n in mine if n in done} | hash_files(folder, set(mine) - set(done)), "")
    except OSError as error:
        answer = ({}, f"{rank_sync.whoami()}: {error}")
    files: dict[str, dict] = {}
    for found, wrong in rank_sync.gather(answer):
        if wrong:
            raise rank_sync.AllRanksError(wrong)
        files |= found
    return files


def _sidecar(folder: Path, rank: int) -> Path:
    return folder / f"{HASHES}{rank}.json"


def _write_then_hash(write, folder: str, rank: int, world: int, *args, **kwargs) -> None:
    write(*args, **kwargs)
    place = Path(folder)
    mine = [n for n in contents(place) if owner(n, world) == rank and n.endswith(".distcp")]
    with new_file(_sidecar(place, rank)) as temporary:
        temporary.write_text(json.dumps(hash_files(place, mine)))


_manager: SyncManager | None = None


def _prepare_results_queue(asynchronous: bool) -> None:
    """Where writers leave what they wrote. Megatron starts a server process for it, which outlives a killed trainer.

    Saving synchronously, reader and writer of the queue are the same process. Saving asynchronously they are not, and
    the server ends with us.
    """
    global _manager
    if not asynchronous:
        set_results_queue(queue.Queue())  # a new one each time: a failed save may leave a result behind
        return
    if _manager is None:
        _manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        _manager.start(initializer=die_with_parent, initargs=(os.getpid(),))
    set_results_queue(_manager.Queue())
