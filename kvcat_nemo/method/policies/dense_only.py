"""`none`: no masked pass, the dense one and its cross-entropy alone. The control: the same training without masks, equal tokens."""

from __future__ import annotations

from kvcat_nemo.method.policies.policy import Policy


class DenseOnly(Policy):
    """Takes every setting of the masked pass, so that a control differs from its run by one field."""

    name = "none"
    paired = False
    mask_spans = ("window", "prefix")

    def loss_weights(self, config):
        return {"anchor": config.anchor_weight}
