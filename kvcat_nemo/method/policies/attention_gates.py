"""`attention`: each layer keeps the slots that get most attention (H2O, arXiv 2306.14048); looks ahead, no gradient."""

from __future__ import annotations

from kvcat_nemo.method.policies.policy import Policy


class AttentionPolicy(Policy):
    """See method/accumulated_attention.py."""

    name = "attention"
    reads_attention = True

    def attention_gates(self, config, mass_BT, position_BT):
        from kvcat_nemo.method.accumulated_attention import attention_gate

        return attention_gate(mass_BT, config.target_keep_fraction, position_BT)
