"""KV-Distill's gates: a scorer chooses them before the first layer (kvcat_nemo.method.kvdistill)."""

from __future__ import annotations

from typing import ClassVar

from kvcat_nemo.method.policies.policy import Policy


class ScorerPolicy(Policy):
    """Gates come from the KV-Distill model itself; rows behind a context read them. No anchor: the base is frozen."""

    name: ClassVar[str] = "scorer"
    own_model: ClassVar[bool] = True
    mask_spans: ClassVar[tuple[str, ...]] = ("prefix",)

    def loss_weights(self, config):
        return {"anchor": 0.0, "distill": config.distill_weight}
