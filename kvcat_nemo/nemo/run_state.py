"""What the callbacks of one run share, and the phases of a run: who acts in which phase, and in which order.

`KVCatTrainer` makes one `RunState` per run and hands it to every callback. A callback reads what others wrote from the state;
no callback looks for another one. Lightning calls callbacks in the order of `trainer.callbacks`, checkpoints last, and
`PHASES` says what that order is for; nemo.trainer puts the callbacks into it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Phase(NamedTuple):
    """A part of a run's life."""

    name: str
    hooks: dict[str, tuple[str, ...]]
    """Lightning's or NeMo's hook → callbacks that act in it, in their order."""
    why: str
    """Why they act in this order."""


PHASES = (
    Phase(
        "start",
        {
            "setup": ("KVCatStop", "KVCatHeartbeat", "KVCatCheckpoint"),
            "on_fit_start": ("KVCatMetrics",),
            "on_train_start": ("KVCatMetrics", "KVCatStop", "KVCatRecords", "KVCatCheckpoint"),
        },
        "Signals are caught first. The validation before the first step belongs to the metrics. The checkpoint comes last: there "
        "NeMo moves away the loose files that the run's former process left.",
    ),
    Phase(
        "step begin",
        {"on_train_batch_start": ("KVCatRandomState", "KVCatMetrics", "KVCatProgress")},
        "Training's random state is put back before anything draws; then the state's `step` is made anew.",
    ),
    Phase(
        "loss known",
        {"on_megatron_step_end": ("KVCatMetrics",)},
        "Named loss parts of all micro-batches, reduced over ranks, in `step.figures`.",
    ),
    Phase(
        "gradients known",
        {"on_before_optimizer_step": ("KVCatMetrics", "KVCatGuard")},
        "The metrics measure the norms (`step.norms`); the guard reads them and decides whether the update counts (`step.skipped`).",
    ),
    Phase(
        "step end",
        {
            "on_train_batch_end": (
                "KVCatRandomState",
                "KVCatMetrics",
                "KVCatProgress",
                "KVCatStop",
                "KVCatRecords",
                "KVCatCheckpoint",
            )
        },
        "The random state is kept before anything else draws. The figures are written before the checkpoint that counts them, and "
        "whether the run was asked to stop is known before the checkpoint, which then saves.",
    ),
    Phase(
        "validation",
        {
            "on_validation_start": ("KVCatMetrics", "KVCatProgress"),
            "on_validation_batch_end": ("KVCatProgress",),
            "on_validation_end": ("KVCatMetrics", "KVCatProgress", "KVCatCheckpoint"),
        },
        "The means (`validation`) are made before the bar shows them and the checkpoint's score takes them.",
    ),
    Phase(
        "save",
        {
            "state_dict": ("KVCatMetrics", "KVCatGuard", "KVCatCheckpoint"),
            "load_state_dict": ("KVCatMetrics", "KVCatGuard", "KVCatCheckpoint"),
        },
        "Counters travel in the checkpoint under the callbacks' names; `random_state`, a row per rank, through the strategy.",
    ),
    Phase(
        "end",
        {
            "on_train_epoch_end": ("KVCatCheckpoint",),
            "on_train_end": ("KVCatMetrics", "KVCatProgress", "KVCatCheckpoint"),
            "on_fit_end": ("KVCatMetrics", "KVCatStop", "KVCatRecords"),
            "teardown": ("KVCatStop", "KVCatHeartbeat"),
        },
        "The last validation comes before the last save, which keeps its score; finished.json and stopped.json come after the save.",
    ),
    Phase(
        "failure",
        {"on_exception": ("KVCatStop", "KVCatHeartbeat")},
        "Signals get their former handlers back; then the other ranks are told.",
    ),
)


@dataclass
class StepState:
    """The training step under way. What is None is not known yet."""

    figures: dict[str, float] | None = None
    """Loss parts and keep rates by name (engine.step), reduced over ranks."""
    local_loss_finite: bool | None = None
    """Of this rank's own micro-batches."""
    norms: dict[str, float] | None = None
    """Gradient norms by parameter group."""
    skipped: bool = False
    """The guard left the update out."""
    seconds_at_start: float = 0.0
    """time.perf_counter() at the step's begin."""

    def known(self, name: str) -> Any:
        """A field that an earlier phase must have set.

        Raises:
            RuntimeError: when it is not known: a callback acts out of its order (PHASES).
        """
        value = getattr(self, name)
        if value is None:
            raise RuntimeError(
                f"run state: {name!r} of this step is not known yet; the callbacks of this run do not act in the order of "
                "kvcat_nemo.nemo.run_state.PHASES. Leave trainer.callbacks as KVCatTrainer arranged it"
            )
        return value


@dataclass
class RunState:
    """One per run. Each field has one writer, named here."""

    step: StepState = field(default_factory=StepState)
    """KVCatMetrics makes it anew at each step's begin and fills it; KVCatGuard sets `skipped`."""
    train: dict[str, float] = field(default_factory=dict)
    """Figures of the last finished step, as in metrics.jsonl (KVCatMetrics)."""
    validation: dict[str, float] = field(default_factory=dict)
    """Figures of the last validation (KVCatMetrics)."""
    consumed_tokens: int = 0
    """Tokens that counted in a loss, over the whole run (KVCatMetrics)."""
    skipped_steps: int = 0
    """Over the whole run, resumed parts included (KVCatGuard)."""
    skipped_in_a_row: int = 0
    """Up to the last step (KVCatGuard)."""
    failed_saves: int = 0
    """Since the last save that succeeded (KVCatCheckpoint)."""
    random_state: torch.Tensor | None = None
    """This rank's, after the last step (KVCatRandomState)."""
    stop_requested: bool = False
    """All ranks have agreed to end after this step (KVCatStop)."""


class RunCallback:
    """Mixed into a Lightning callback that shares the run's state."""

    _run_state: RunState | None = None

    def bind(self, state: RunState) -> None:
        """Called by the trainer before anything else."""
        self._run_state = state

    @property
    def run(self) -> RunState:
        """The state of the run that this callback belongs to.

        Raises:
            RuntimeError: when no KVCatTrainer has handed one out.
        """
        if self._run_state is None:
            raise RuntimeError(
                f"{type(self).__name__} belongs to no run: give it to a kvcat_nemo.nemo.trainer.KVCatTrainer as one of its callbacks"
            )
        return self._run_state


def run_state(trainer) -> RunState:
    """The state of a trainer's run.

    Raises:
        TypeError: when the trainer has none.
    """
    state = getattr(trainer, "run_state", None)
    if not isinstance(state, RunState):
        raise TypeError(
            f"trainer={type(trainer).__module__}.{type(trainer).__name__}: a KV-CAT run needs kvcat_nemo.nemo.trainer.KVCatTrainer, which "
            "holds the state that its callbacks share; use it, or derive from it"
        )
    return state
