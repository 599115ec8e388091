"""When to save, what to keep, and what to do when a save fails."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional

from megatron.core import parallel_state
from nemo import lightning as nl
from nemo.lightning.io.pl import TrainerContext
from nemo.utils import logging

from kvcat_nemo.engine import rank_sync
from kvcat_nemo.models.function import write_record
from kvcat_nemo.nemo.base_model import trained_function
from kvcat_nemo.nemo.checkpoint_io import SAVE_FAILED, KVCatAsyncIO, collect_hashes
from kvcat_nemo.nemo.choices import check_choice
from kvcat_nemo.nemo.run_state import RunCallback
from kvcat_nemo.runs.checkpoint_manifest import write_manifest
from kvcat_nemo.runs.checkpoints import complete
from kvcat_nemo.runs.layout import CONTEXT, UNFINISHED
from kvcat_nemo.runs.retention import remove, tidy
from kvcat_nemo.runs.vocabulary import PADDED, VOCABULARY, padded

OnFailedSave = Literal["continue", "stop"]
"""Whether training goes on after a save that failed (log.ckpt.on_failed_save)."""


class KVCatCheckpoint(RunCallback, nl.ModelCheckpoint):
    """Saves to checkpoints/step=N, which is complete once its manifest is written (kvcat_nemo.runs) and counts only then.

    Args:
        every_n_train_steps: steps between saves; the last step and a requested stop are saved too.
        keep_last: newest complete checkpoints to keep, at least 1.
        keep_best: 1 keeps the checkpoint with the best `best_metric` besides; 0 does not.
        best_metric: a validation figure (metrics.jsonl), lower is better, of the validation after the same step: let
            trainer.val_check_interval divide every_n_train_steps. A run without masked pass takes dense_ppl for masked_ppl.
        on_failed_save: `continue` goes on training without it, and says so; `stop` ends the run.
        max_failed_saves: failed saves in a row after which `continue` stops as well.
    """

    def __init__(
        self,
        every_n_train_steps: int = 1000,
        keep_last: int = 2,
        keep_best: int = 1,
        best_metric: str = "masked_ppl",
        on_failed_save: OnFailedSave = "continue",
        max_failed_saves: int = 3,
        dirpath: Optional[str] = None,
    ):
        if every_n_train_steps < 1:
            raise ValueError(
                f"log.ckpt.every_n_train_steps={every_n_train_steps!r}: give at least 1; a number above trainer.max_steps "
                "saves at the end alone"
            )
        if keep_last < 1:
            raise ValueError(f"log.ckpt.keep_last={keep_last!r}: keep at least 1")
        check_choice("log.ckpt.keep_best", keep_best, Literal[0, 1])
        check_choice("log.ckpt.on_failed_save", on_failed_save, OnFailedSave)
        if max_failed_saves < 1:
            raise ValueError(f"log.ckpt.max_failed_saves={max_failed_saves!r}: give at least 1")
        super().__init__(
            monitor=None,
            save_top_k=-1,
            save_last=False,
            every_n_train_steps=every_n_train_steps,
            save_optim_on_train_end=True,
            filename="{step}",
            dirpath=dirpath,
            verbose=False,
        )
        self.every_n_train_steps = every_n_train_steps
        self.keep_last, self.keep_best, self.best_metric = keep_last, keep_best, best_metric
        self.on_failed_save, self.max_failed_saves = on_failed_save, max_failed_saves
        self._saved_at = -1
        self._scores: dict[int, tuple[str, float]] = {}

    @property
    def state_key(self) -> str:
        return type(self).__name__  # not of its settings: those may change between two parts of a run

    def state_dict(self) -> dict[str, Any]:
        return {}  # all of it is read from the folder

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def nemo_topk_check_previous_run(self) -> None:
        """NeMo's would delete by its own rule."""

    # --- when ---

    def setup(self, trainer, *args, **kwargs) -> None:
        super().setup(trainer, *args, **kwargs)
        if isinstance(trainer.strategy.checkpoint_io, KVCatAsyncIO):
            trainer.strategy.checkpoint_io.on_failure = lambda error: self._failed(self._writing, error)

    def on_train_start(self, trainer, pl_module) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = trainer.global_step  # where it was resumed from, or nothing to save yet

    def on_train_batch_end(self, trainer, *args, **kwargs) -> None:
        # The last one waits for the last validation (on_train_end): a run that is resumed at its end does nothing more.
        due = trainer.global_step % self.every_n_train_steps == 0
        if (due and trainer.global_step != trainer.max_steps) or self.run.stop_requested:
            self._save(trainer)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        pass

    def on_validation_end(self, trainer, pl_module) -> None:
        validation = self.run.validation
        if trainer.sanity_checking or not validation:
            return
        metric = self.best_metric
        if metric == "masked_ppl" and metric not in validation:
            metric = "dense_ppl"
        if metric not in validation:
            raise ValueError(
                f"log.ckpt.best_metric={self.best_metric!r}: a validation has no such figure; known: {', '.join(validation)}"
            )
        if math.isfinite(validation[metric]):
            self._scores[trainer.global_step] = (metric, validation[metric])
        if self._saved_at == trainer.global_step > 0:
            rank_sync.on_first_rank(self._tidy)

    def on_train_end(self, trainer, pl_module) -> None:
        # The last chance: a save that failed a moment ago is tried once more, and failing again (or an asynchronous one
        # that fails while it is waited for) ends the run as failed.
        self.on_failed_save = "stop"
        if not trainer.fast_dev_run and self._saved_at != trainer.global_step:
            self._save(trainer)

    # --- how ---

    def _save(self, trainer) -> None:
        path = Path(self.dirpath) / f"step={trainer.global_step}"
        self._writing, started = path, time.monotonic()
        try:
            rank_sync.on_first_rank(lambda: self._begin(path))
            finish = self._finisher(trainer, path, trainer.global_step, started)
            options = {"finalize_fn": finish} if self.async_save else None
            self._saved_at = trainer.global_step
            trainer.save_checkpoint(str(path), False, storage_options=options)
            function = trained_function(trainer.lightning_module.config)
            rank_sync.on_first_rank(lambda: write_record(path, function))
            if self.always_save_context:
                rank_sync.on_first_rank(lambda: _dump_context(trainer, path / CONTEXT))
            if not self.async_save:
                finish()
        except SAVE_FAILED as error:
            self._failed(path, error)
        except OSError as error:
            if rank_sync.world_size() > 1:
                raise  # on this rank alone: the others learn of it from the heartbeat
            self._failed(path, error)

    def _begin(self, path: Path) -> None:
        self._check_room(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + UNFINISHED).touch()
        if (
            path.exists()
        ):  # of a former process that got further, before the run was set back to an older checkpoint
            remove(path)
            path.with_name(path.name + UNFINISHED).touch()

    def _check_room(self, path: Path) -> None:
        newest = complete(path.parent)[:1]
        if not newest:
            return
        needed, free = newest[0].manifest.bytes, shutil.disk_usage(path.parent).free
        if free < needed * 1.02:
            raise OSError(
                f"no room for a checkpoint: {newest[0].path.name} took {needed / 1e6:,.1f} MB, {path.parent} has "
                f"{free / 1e6:,.1f} MB left"
            )

    def _finisher(self, trainer, path: Path, step: int, started: float) -> Callable[[], None]:
        def finish() -> None:
            files = collect_hashes(path)
            facts = {"world_size": rank_sync.world_size(), "seconds": round(time.monotonic() - started, 3)}
            facts |= _vocabulary(trainer)

            def declare_complete() -> None:
                write_manifest(path, step, files, **facts)
                path.with_name(path.name + UNFINISHED).unlink(missing_ok=True)
                self._tidy()  # it is complete: whatever fails from here on is no failed save

            rank_sync.on_first_rank(declare_complete)
            self.run.failed_saves = 0
            self.last_model_path = str(path)
            if trainer.is_global_zero:
                for logger in trainer.loggers:
                    logger.after_save_checkpoint(self)
            logging.info(f"kvcat: checkpoint of step {step} complete: {path}")

        return finish

    def _failed(self, path: Path, error: BaseException) -> None:
        """What a failed save leads to; called on every rank."""
        self.run.failed_saves += 1
        self._saved_at = -1
        text = next(t for t in rank_sync.gather(_reason(error)) if t) + _room(path.parent)
        # Its marker says that it is this save's, and not one that lay there before.
        marker = path.with_name(path.name + UNFINISHED)
        rank_sync.on_first_rank(lambda: remove(path) if marker.exists() else None)
        kept = complete(path.parent)
        newest = (
            f"{kept[0].path} (step {kept[0].step}) is the newest complete one"
            if kept
            else "there is none yet"
        )
        message = f"kvcat: SAVING {path} FAILED ({self.run.failed_saves} in a row): {text}. Nothing complete was touched: {newest}."
        if self.on_failed_save == "stop" or self.run.failed_saves >= self.max_failed_saves:
            raise RuntimeError(f"{message} Training ends: make room, then start the run again.") from None
        logging.error(
            f"{message} Training goes on and tries again at the next save; after {self.max_failed_saves} failures in a row it "
            "ends (log.ckpt.max_failed_saves)."
        )

    def _tidy(self) -> None:
        """On rank 0, after a save and after a validation. What fails here is no failed save."""
        metrics = [self.best_metric] + (["dense_ppl"] if self.best_metric == "masked_ppl" else [])
        try:
            tidy(
                Path(self.dirpath),
                self._scores,
                keep_last=self.keep_last,
                keep_best=bool(self.keep_best),
                metrics=metrics,
            )
        except OSError as error:
            logging.error(f"kvcat: could not tidy up {self.dirpath}: {error}")


def _vocabulary(trainer) -> dict[str, int]:
    """Tokens of the vocabulary, and rows of the embedding with Megatron's padding: what an export may cut off."""
    config = trainer.lightning_module.config
    data = trainer.datamodule
    size = (
        config.true_vocab_size
        or config.vocab_size
        or getattr(getattr(data, "tokenizer", None), "vocab_size", None)
    )
    if not size:
        return {}
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return {VOCABULARY: int(size), PADDED: padded(config.vocab_size or int(size), tp, 1)}


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if failures is None:
        return str(error)
    # torch's own text carries whole tracebacks; ranks other than the coordinator have no failures at all.
    return "; ".join(f"rank {r}: {pair[0]}" for r, pair in failures.items())


def _room(folder: Path) -> str:
    # torch's writers meet a full disk with an error about positions in a file that does not say what is wrong.
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return f" ({folder}: {error})"
    full = usage.free < max(0.01 * usage.total, 10e6)
    return f" ({usage.free / 1e6:,.1f} MB left there{': no space left on the device' if full else ''})"


def _dump_context(trainer, folder: Path) -> None:
    try:
        TrainerContext.from_trainer(trainer).io_dump(folder, yaml_attrs=["model"])
    except OSError:
        raise
    except Exception as error:  # NeMo cannot describe every object; weights and resuming do not need it
        logging.warning(f"kvcat: {folder} is not complete: {error}")
