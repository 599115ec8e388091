"""A toy policy with a router of its own: the sign of one product per token decides, and its loss pulls on the mean."""

from kvcat_nemo.method.policies.policy import Policy, Range


class OneWeight(Policy):
    name = "one-weight"
    has_routers = True
    settings = {"num_groups": Range(lambda c: c.num_groups <= 8, "give at most 8")}

    def refuse(self, config):
        if config.recent_window != 1:
            raise ValueError(f"kvcat.recent_window={config.recent_window!r}: one-weight has none; give 1")

    def loss_weights(self, config):
        return super().loss_weights(config) | {"budget": 2 * config.budget_weight}

    def build_router(self, config, hidden_size, group, kv_heads):
        import torch

        from kvcat_nemo.method.router import Routing

        class Router(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.linspace(-1, 1, hidden_size) * (group + 1))

            def forward(self, h_BTM, segments=None, position_BT=None):
                p_BT = (h_BTM @ self.weight).sigmoid()
                return Routing(p_BT, (p_BT > 0.5).to(p_BT.dtype).detach())

        return Router()

    def router_parameters(self, config, hidden_size, kv_heads):
        return hidden_size

    def router_loss(self, config, kept, probability):
        return (probability - config.target_keep_fraction) ** 2
