"""A toy policy: every third slot of a document is kept; no gradient."""

from kvcat_nemo.method.policies.policy import Policy


class EveryThird(Policy):
    name = "every-third"
    reads_tokens = True

    def window_gates(self, config, tokens_BT, position_BT):
        import torch

        place = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT) if position_BT is None else position_BT
        gate_BT = (place % 3 == 0).float()
        return torch.stack([gate_BT] * config.num_groups), None

    def target_keep(self, settings):
        return 1 / 3
