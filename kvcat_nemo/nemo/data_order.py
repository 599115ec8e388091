"""A data module's order of windows, kept in the run's checkpoints: a resumed run continues it, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nemo.utils import logging

from kvcat_nemo.common.limits import check_size
from kvcat_nemo.data.run_order import EPOCHS, MEGATRON, changes, refusal
from kvcat_nemo.nemo.choices import check_choice
from kvcat_nemo.runs.layout import RunFolder, read_record

STATE = "order"
"""Its name in a data module's state, in every checkpoint."""
"""The same beside the run's other records, read before anything has started."""

OnChange = Literal["refuse", "say"]
"""What a setting leads to by which a resumed run would read its windows in another order."""

SIZES = {
    "seq_length": "positions",
    "vocab_size": "vocabulary",
    "micro_batch_size": "batch",
    "global_batch_size": "batch",
    "num_workers": "workers",
    "seed": "seed",
}
"""Sizes of a data module, and the kinds of kvcat_nemo.common.limits that bound them."""

OLD_RUN = (
    "kvcat: this run was begun before its order of windows was kept. It continues as it would have then, with Megatron's own "
    "order, which depends on trainer.max_steps × data.global_batch_size. What cannot be checked: that both, data.seed, "
    "data.seq_length, data.split and data.paths are those of the run's beginning. If one is not, or if the run is extended "
    "across the end of an epoch, some windows are read again and some never"
)


class KeepsOrder:
    """Mixed into a data module with `data_sampler`, `global_batch_size`, `seed` and a trainer.

    on_change: see OnChange.
    """

    on_change: OnChange = "refuse"
    _index = EPOCHS
    _order: dict[str, Any] | None = None

    def _check_sizes(self, **sizes: Any) -> None:
        """Set attributes to their sizes (SIZES) as integers."""
        for name, value in sizes.items():
            setattr(self, name, check_size(f"data.{name}", value, SIZES[name]))
        check_choice("data.on_change", self.on_change, OnChange)

    def describe_order(self, trainer) -> dict[str, Any]:
        """What the order depends on (data.run_order), with the trainer's settings as they were given."""
        raise NotImplementedError

    def check_run(self, trainer, candidates: list[Path] | tuple[Path, ...] = ()) -> None:
        """Refuse another order than that of the run, and data that cannot be read, while nothing has started.

        Args:
            candidates: checkpoints that the run may resume from, the first choice first.

        Raises:
            ValueError: naming the setting, what it was, and what to do.
        """
        if self._order is None:
            self._order = self.describe_order(trainer)
        if not candidates:
            return
        file = RunFolder.of_checkpoint(candidates[0]).order
        try:
            before = read_record(file)
        except (OSError, ValueError):
            return  # the checkpoint has it too, and says so when it is loaded
        if before and before.get("index") != MEGATRON:
            self._refuse_changes(before, str(candidates[0]), say=False)

    def _refuse_changes(self, before: Mapping[str, Any], checkpoint: str, *, say: bool) -> None:
        found = changes(before, self._order)
        message = refusal(found, checkpoint)
        if message and self.on_change == "refuse":
            raise ValueError(message)
        for change in found if say else ():
            logging.warning(f"kvcat: {change}")

    def _keep_order(self, before: Mapping[str, Any] | None) -> None:
        """Go on with a checkpoint's order; called as its state is loaded, on every rank."""
        if before is None or before.get("index") == MEGATRON:
            self._index = self.order_record()["index"] = MEGATRON
        if before is None:
            logging.warning(OLD_RUN)
        else:
            self._refuse_changes(before, str(self.trainer.ckpt_path or "its checkpoint"), say=True)

    def windows_needed(self) -> int:
        """Windows from the run's first to its last: those that were read, whatever the batch was then, and those to come."""
        steps = max(self.trainer.max_steps - self.trainer.global_step, 0)
        return self.data_sampler.init_consumed_samples + steps * self.global_batch_size

    def order_record(self) -> dict[str, Any]:
        """The order as it is kept; of the trainer's settings, those from before the run changed them."""
        if self._order is None:
            self._order = self.describe_order(self.trainer)
        return self._order
