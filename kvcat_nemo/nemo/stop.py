"""Stops a run at a step's end, on a signal or a flag file: all ranks decide together, save, and exit with one code.

The contract with whatever launches a run: SIGTERM, SIGUSR1, or the file that KVCAT_STOP_FILE names → the run saves after
the step it is in and every rank exits with 75 (EX_TEMPFAIL): start the same command again.
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging

from kvcat_nemo.engine import rank_sync
from kvcat_nemo.nemo.mlflow_logger import run_folder, write_atomically
from kvcat_nemo.nemo.old_names import moved_class
from kvcat_nemo.nemo.run_state import RunCallback
from kvcat_nemo.runs.exit_codes import REQUEUE as EXIT_REQUEUE
from kvcat_nemo.runs.layout import STOPPED

STOP_FILE = "KVCAT_STOP_FILE"
"""Environment variable: path of a file that asks every rank to stop once it exists. (A signal to torchrun ends torchrun.)"""


class KVCatStop(RunCallback, pl.Callback):
    """Ends the run at the end of the step in which it was asked to, on the same step on every rank.

    Args:
        signals: names of the signals that ask for it.

    A signal sent twice asks once. A flag file that is older than this process is a former run's and is ignored.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")):
        unknown = [s for s in signals if not hasattr(signal, s)]
        if unknown:
            raise ValueError(
                f"signals={list(signals)!r}: {unknown[0]} is no signal; give names such as SIGTERM"
            )
        self.signals = tuple(signals)
        self._asked_by = ""
        self._old: dict[int, Any] = {}
        self._file = os.environ.get(STOP_FILE)
        self._born = _process_start()

    def _on_signal(self, number, frame) -> None:
        # No logging here: the signal may have come in the middle of a write to the log.
        self._asked_by = self._asked_by or signal.Signals(number).name

    def _install(self) -> None:
        for name in self.signals:
            number = getattr(signal, name)
            old = signal.signal(number, self._on_signal)
            self._old.setdefault(number, old)

    def _restore(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._old = {}

    def setup(self, trainer, pl_module, stage) -> None:
        self._install()

    def on_train_start(self, trainer, pl_module) -> None:
        self._install()  # again: Lightning has put its own in between, which end a run without saving
        if trainer.is_global_zero:
            (run_folder() / STOPPED).unlink(missing_ok=True)

    def _poll(self) -> str:
        if self._asked_by or not self._file or int(os.environ.get("LOCAL_RANK", "0")):
            return self._asked_by
        try:
            if os.stat(self._file).st_mtime >= self._born:
                self._asked_by = f"{STOP_FILE}={self._file}"
        except OSError:
            pass
        return self._asked_by

    def on_train_batch_end(self, trainer, *args, **kwargs) -> None:
        if not rank_sync.any_rank(bool(self._poll())):
            return
        self.run.stop_requested = True
        trainer.should_stop = True
        trainer.limit_val_batches = 0  # Lightning validates before an early stop; the time may be short
        reasons = sorted({reason for reason in rank_sync.gather(self._asked_by) if reason})
        self._asked_by = reasons[0]
        logging.warning(
            f"kvcat: asked to stop ({', '.join(reasons)}): saving after step {trainer.global_step}, exit code {EXIT_REQUEUE}"
        )

    def on_fit_end(self, trainer, pl_module) -> None:
        if self.run.stop_requested and trainer.is_global_zero:
            checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "")
            record = {
                "step": trainer.global_step,
                "reason": self._asked_by,
                "exit_code": EXIT_REQUEUE,
                "checkpoint": str(checkpoint),
                "time": time.time(),
            }
            write_atomically(run_folder() / STOPPED, json.dumps(record) + "\n")

    def teardown(self, trainer, pl_module, stage) -> None:
        self._restore()

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._restore()


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()


def __getattr__(name: str):
    return moved_class(__name__, name)
