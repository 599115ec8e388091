"""`router`: a small network per layer group proposes the gates, and is trained with the model (KV-CAT, arXiv 2605.05971)."""

from __future__ import annotations

from kvcat_nemo.method.policies.policy import Policy, Range


class RouterPolicy(Policy):
    """See method/router.py for the network and method/losses.py for its budget loss."""

    name = "router"
    has_routers = True
    masks_per = ("token", "kv_head")
    settings = {
        "router_dim": Range(lambda c: c.router_dim >= 1, "give a width of at least 1"),
        "router_init_keep": Range(
            lambda c: 0.5 <= c.router_init_keep <= 1, "give a probability from 0.5 to 1"
        ),
        "router_init_jitter": Range(lambda c: c.router_init_jitter >= 0, "give 0 or more"),
        "router_lr_mult": Range(lambda c: c.router_lr_mult > 0, "give a positive factor"),
        "router_input": Range(lambda c: c.router_input in ("masked", "dense"), "choose one of masked, dense"),
    }

    def loss_weights(self, config):
        return super().loss_weights(config) | {"budget": config.budget_weight}

    def build_router(self, config, hidden_size, group, kv_heads):
        from kvcat_nemo.method.router import Router

        return Router(hidden_size, config, group, kv_heads)

    def router_parameters(self, config, hidden_size, kv_heads):
        proposals = kv_heads if config.mask_per == "kv_head" else 1
        return (
            proposals * hidden_size * hidden_size + 4 * hidden_size * config.router_dim + 2 * hidden_size + 1
        )

    def router_loss(self, config, kept, probability):
        from kvcat_nemo.method.losses import budget_of_means

        return budget_of_means(kept, probability, config.target_keep_fraction)
