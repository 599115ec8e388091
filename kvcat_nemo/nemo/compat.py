"""Every reach of this room into what NeMo, Lightning and Megatron-core do not offer to others, and a check that it is still there.

Each function says what it reaches and why; `REACHES` says where that stands. Importing this module looks for all of them: a
version in which one is gone ends here with its name, and not in the middle of a run. Megatron's seam that has nothing to do
with NeMo stands in the engine.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

from nemo import lightning as nl
from nemo.collections.llm.gpt.data.pre_training import PreTrainingDataModule
from nemo.lightning.data import WrappedDataLoader
from torch.utils.data import Dataset

CHECKED = {"nemo-toolkit": "2.7.3", "lightning": "2.4.0", "megatron-core": "0.15.3"}
"""Versions with which all of this was run."""


class Reach(NamedTuple):
    """Something inside of another package."""

    package: str
    where: str
    """module:object in which it stands."""
    name: str
    """An attribute of that object or, with a leading `self.`, one that its source code uses."""


REACHES = (
    Reach("nemo-toolkit", "nemo.lightning.io.pl", "_fix_tensors_device"),
    Reach("nemo-toolkit", "nemo.lightning.io.pl:MegatronCheckpointIO", "self._save_sharded_strategy"),
    Reach("nemo-toolkit", "nemo.lightning.pytorch.strategies:MegatronStrategy", "self.timers"),
    Reach("nemo-toolkit", "nemo.lightning.megatron_parallel:MegatronStep", "micro_batch_size"),
    Reach("nemo-toolkit", "nemo.lightning:AutoResume", "_find_trainer_ckpt_path"),
    Reach("nemo-toolkit", f"{PreTrainingDataModule.__module__}:PreTrainingDataModule", "_create_dataloader"),
    Reach("nemo-toolkit", f"{PreTrainingDataModule.__module__}:PreTrainingDataModule", "self._train_ds"),
    Reach(
        "nemo-toolkit",
        f"{PreTrainingDataModule.__module__}:PreTrainingDataModule.build",
        "trainer_val_check_interval",
    ),
    Reach("lightning", "lightning.pytorch.strategies:DDPStrategy", "self._process_group_backend"),
    Reach("lightning", "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop", "self.val_loop"),
    Reach(
        "lightning", "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop", "self.batch_progress"
    ),
    Reach("lightning", "lightning.pytorch.loops.loop:_Loop", "restarting"),
    Reach(
        "megatron-core", "megatron.core.dist_checkpointing.strategies.filesystem_async", "self._results_queue"
    ),
    Reach("megatron-core", "megatron.core.dist_checkpointing.strategies.base", "register_default_strategy"),
)


def missing(reaches=REACHES) -> list[str]:
    """What is not where it was, with the versions."""
    out = []
    for reach in reaches:
        module, _, path = reach.where.partition(":")
        try:
            owner: Any = importlib.import_module(module)
            for part in path.split(".") if path else []:
                owner = getattr(owner, part)
            there = hasattr(owner, reach.name)
            if not there:
                own = re.escape(reach.name.removeprefix("self."))
                there = bool(re.search(rf"(?:\bself\.|(?<![\w.])){own}\b", inspect.getsource(owner)))
        except (ImportError, AttributeError):
            there = False
        if not there:
            out.append(
                f"{reach.where} has no {reach.name} any more ({reach.package} {_installed(reach.package)}; "
                f"checked with {CHECKED[reach.package]})"
            )
    return out


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "as a source tree"


if _gone := missing():
    pins = " ".join(f"{package}=={version}" for package, version in CHECKED.items())
    raise ImportError(f"{'; '.join(_gone)}. kvcat_nemo needs it there: pip install {pins}")


# --- a CPU host ---


def load_checkpoints_without_cuda() -> None:
    """Replaces nemo.lightning.io.pl._fix_tensors_device, which asserts an initialised CUDA context before it moves loaded
    tensors between CUDA devices. On a CPU host there are none."""
    import nemo.lightning.io.pl as checkpoint_io

    checkpoint_io._fix_tensors_device = lambda checkpoint: checkpoint


def fit_strategy_to_cpu(strategy: nl.MegatronStrategy, backend: str) -> None:
    """Sets DDPStrategy._process_group_backend, which is an argument of Lightning's strategies and not of NeMo's; and
    MegatronStrategy.timers to None: the progress printer gathers a table of timers from all ranks, which never ends on gloo
    when it is empty."""
    strategy._process_group_backend = backend
    strategy.timers = None


# --- checkpoints ---


def forget_save_plan(checkpoint_io) -> None:
    """Clears MegatronCheckpointIO._save_sharded_strategy: a plan cached from a save that failed must not be used again."""
    checkpoint_io._save_sharded_strategy = None


def set_results_queue(results) -> None:
    """Sets filesystem_async._results_queue, where writers leave what they wrote. Megatron fills it with the queue of a server
    process of its own, which outlives a killed trainer."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = results


def use_common_writer(strategy) -> None:
    """Registers, for the whole process, what writes a checkpoint's common.pt; NeMo hands no such choice on to Megatron."""
    from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy

    register_default_strategy(StrategyAction.SAVE_COMMON, strategy.backend, strategy.version, strategy)


class ResumeFrom(nl.AutoResume):
    """NeMo's AutoResume with the choice of the checkpoint open to subclasses: it overrides AutoResume._find_trainer_ckpt_path,
    which knows nothing of manifests."""

    def checkpoint_to_resume(self) -> Path | None:
        """The checkpoint to go on from, or None."""
        raise NotImplementedError

    def _find_trainer_ckpt_path(self) -> Path | None:
        return self.checkpoint_to_resume()


# --- Lightning's loops ---


def count_resumed_batches(trainer) -> None:
    """Sets the training loop's batch counters to the steps done. A checkpoint is saved before Lightning counts its batch as
    completed: after a resume the batch number, and with it every later validation, would be one step behind."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current
    done.ready = done.started = done.processed = done.completed = trainer.global_step


def validate_between_steps(trainer) -> None:
    """Runs the training loop's own validation loop, as the loop does between steps; Lightning has no call for it. A loop that was
    restored takes the batches of the validation before its checkpoint for its own and leaves as many out: it is told not to."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


def limit_val_batches_in_micro_batches(trainer, per_batch: int) -> None:
    """Gives Trainer.limit_val_batches, a whole number of batches, another meaning: Lightning counts what the loader yields, and
    NeMo's yields micro-batches. Without it a limit of 8 would be half a global batch where a batch has 16 of them."""
    if isinstance(trainer.limit_val_batches, int):
        trainer.limit_val_batches *= per_batch


# --- data ---


def send_windows(step, windows: int):
    """MegatronStep.micro_batch_size, by which Megatron's schedule sizes what travels between pipeline stages, with another meaning:
    a paired batch has twice the windows that the loader yields."""
    return dataclasses.replace(step, micro_batch_size=windows)


def interval_of_one_validation(steps: int) -> int:
    """For PreTrainingDataModule.build's trainer_val_check_interval: "validate every so many steps", from which NeMo sizes the
    validation set. An interval longer than the run sizes it for a single validation, whose windows every validation reads."""
    return steps + 1


class WrapsDatasets(PreTrainingDataModule):
    """NeMo's pretraining data with its datasets open to subclasses: overrides PreTrainingDataModule._create_dataloader and reads
    PreTrainingDataModule._train_ds, since NeMo has no hook between a dataset and its loader."""

    def wrap_dataset(self, dataset: Dataset) -> Dataset:
        """What the loader gets in a dataset's place."""
        return dataset

    @property
    def train_windows(self) -> int:
        """Windows of the training set that was built."""
        return len(self._train_ds)

    def _create_dataloader(self, dataset, mode, **kwargs) -> WrappedDataLoader:
        return super()._create_dataloader(self.wrap_dataset(dataset), mode, **kwargs)
