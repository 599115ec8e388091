"""Watches the weights of dropped slots, so that a GPU seldom has to wait for the answer whether they overflow.

Backward of gated attention is exact while a dropped slot's weights, summed over rows, stay below e^HEADROOM; above, it is done
again with each slot's logits lowered (kernels/attention/gated_function.py). Whether that is needed only the device knows. To ask it in every
call makes the host wait in every layer. So the watch asks in every call only at first, and after a step with large weights.
After QUIET_STEPS steps with weights below e^QUIET it keeps the largest weight on the device and looks once per step.

A weight that grows from below e^30 to above e^60 between two looks is counted, and the next steps are asked call by call again.
Its own step is exact up to e^88, the end of float32; above, its gradient is not a number and `optim.nonfinite` decides.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEADROOM = 60.0
"""Logits by which a dropped slot's weights, summed, may exceed the visible ones; e^60 is far from float32's end."""
QUIET = 30.0
QUIET_STEPS = 20


class OverflowWatch:
    """The state of one process; every gated attention of the process shares it."""

    def __init__(self):
        self.quiet_steps = 0
        self._calls = 0
        self._count: Tensor | None = None
        self._largest: Tensor | None = None

    @property
    def asks(self) -> bool:
        """Whether each call waits for its answer."""
        return self.quiet_steps < QUIET_STEPS

    def exceeded(self, weights: Tensor, split=None) -> bool:
        """Whether backward must be done again. A collective call over `split`.

        Args:
            weights: a call's summed weights of slots.
        """
        largest = weights.amax().float() if weights.numel() else weights.new_zeros((), dtype=torch.float32)
        largest = largest.nan_to_num(nan=math.inf, posinf=math.inf)
        largest = largest if split is None else split.maximum(largest)
        above = self._note(largest)
        return bool(above) if above.device.type == "cpu" or self.asks else False

    def _note(self, largest: Tensor) -> Tensor:
        above = largest > math.exp(HEADROOM)
        self._calls += 1
        if self._count is None or self._count.device != above.device:
            self._count, self._largest = torch.zeros_like(largest), torch.zeros_like(largest)
        self._count += above
        self._largest = self._largest.maximum(largest)
        return above

    def end_of_step(self) -> float:
        """Calls of this step whose weights exceeded the headroom. Waits for the device once."""
        if not self._calls:  # no backward since the last step: validation
            return 0.0
        count, largest = torch.stack([self._count, self._largest]).tolist()
        self.quiet_steps = self.quiet_steps + 1 if largest < math.exp(QUIET) else 0
        self._calls = 0
        self._count.zero_()
        self._largest.zero_()
        return count


watch = OverflowWatch()
