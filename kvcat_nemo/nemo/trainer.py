"""NeMo's trainer with a run's state, its callbacks complete and in their order, and the exit code of a run that was asked to stop."""

from __future__ import annotations

import functools

from lightning.pytorch.callbacks import Callback, Checkpoint
from nemo import lightning as nl
from nemo.utils import logging

from kvcat_nemo.nemo.guard import KVCatGuard
from kvcat_nemo.nemo.liveness import KVCatHeartbeat
from kvcat_nemo.nemo.metrics import KVCatMetrics
from kvcat_nemo.nemo.progress import KVCatProgress
from kvcat_nemo.nemo.records import KVCatRecords
from kvcat_nemo.nemo.rng_callback import KVCatRandomState
from kvcat_nemo.nemo.run_state import RunCallback, RunState, run_state
from kvcat_nemo.nemo.stop import KVCatStop
from kvcat_nemo.runs.exit_codes import REQUEUE

CALLBACKS: tuple[type[Callback], ...] = (
    KVCatRandomState,
    KVCatMetrics,
    KVCatProgress,
    KVCatGuard,
    KVCatStop,
    KVCatHeartbeat,
    KVCatRecords,
)
"""A run's callbacks in the order of every phase (nemo.run_state.PHASES); the checkpoint acts after them."""
OPTIONAL = (KVCatProgress,)
"""Not added where the user has left them out."""


class KVCatTrainer(nl.Trainer):
    """NeMo's trainer, with the state that its run's callbacks share.

    A run that was asked to stop ends the process with exit code 75, after everything is closed.
    """

    # No __init__ of its own: NeMo stores the arguments of this class by its signature.

    @functools.cached_property
    def run_state(self) -> RunState:
        """One per trainer; `start_run` hands it to the callbacks."""
        return RunState()

    def fit(self, *args, **kwargs) -> None:
        super().fit(*args, **kwargs)
        if self.run_state.stop_requested and self.global_step < self.max_steps:
            raise SystemExit(REQUEUE)


def start_run(trainer) -> None:
    """Complete a trainer's callbacks, put them into their order, and hand them the run's state; before any hook is called.

    Raises:
        TypeError: when the trainer is no KVCatTrainer.
        ValueError: when one of CALLBACKS stands there twice.
    """
    state = run_state(trainer)
    trainer.callbacks = arrange(trainer.callbacks)
    for callback in trainer.callbacks:
        if isinstance(callback, RunCallback):
            callback.bind(state)


def arrange(given: list[Callback]) -> list[Callback]:
    """A run's callbacks, none of CALLBACKS missing but OPTIONAL ones, in their order.

    Others keep their place before or after them; checkpoints come last.

    Raises:
        ValueError: when one of CALLBACKS stands there twice.
    """
    ours: list[Callback] = []
    missing: list[str] = []
    for cls in CALLBACKS:
        found = [c for c in given if isinstance(c, cls)]
        if len(found) > 1:
            raise ValueError(
                f"trainer.callbacks has {cls.__name__} {len(found)} times: each would count every step; leave one"
            )
        if not found and cls not in OPTIONAL:
            missing.append(cls.__name__)
            found = [cls()]
        ours += found
    if missing:
        logging.warning(
            f"kvcat: trainer.callbacks lacks {', '.join(missing)}: added, since figures, checkpoints and checks of the run need them. "
            "Leave the recipe's callbacks in the list, and add others before or after them"
        )
    first = next((i for i, c in enumerate(given) if c in ours), 0)
    others = [(i, c) for i, c in enumerate(given) if c not in ours]
    before = [c for i, c in others if i < first and not isinstance(c, Checkpoint)]
    rest = [c for _, c in others if c not in before]
    return before + ours + sorted(rest, key=lambda c: isinstance(c, Checkpoint))
