"""`random`: each slot is kept with the same probability, by a hash of its document up to it; no gradient.

With `mask_span=prefix` each window is cut once, and slots before the cut are kept for the rows behind it, a fraction that is
drawn for each window.
"""

from __future__ import annotations

from kvcat_nemo.method.policies.policy import Policy, Range


class RandomPolicy(Policy):
    """See method/random_draws.py."""

    name = "random"
    reads_tokens = True
    mask_spans = ("window", "prefix")
    settings = {
        "prefix_keep_min": Range(lambda c: 0 < c.prefix_keep_min <= 1, "give a fraction above 0, up to 1"),
        "prefix_keep_max": Range(
            lambda c: c.prefix_keep_min <= c.prefix_keep_max <= 1,
            "give a fraction from prefix_keep_min={prefix_keep_min} to 1",
        ),
        "prefix_cut_multiple": Range(lambda c: c.prefix_cut_multiple >= 1, "give 1 token or more"),
    }

    def window_gates(self, config, tokens_BT, position_BT):
        import torch

        from kvcat_nemo.method.random_draws import prefix_ids, random_gate, random_prefix

        ids = prefix_ids(tokens_BT, position_BT)
        draw = {"seed": config.seed, "position_BT": position_BT}
        keep, cut_BT = config.target_keep_fraction, None
        if config.masks_prefix:
            cut_BT, keep = random_prefix(
                ids,
                keep_min=config.prefix_keep_min,
                keep_max=config.prefix_keep_max,
                multiple=config.prefix_cut_multiple,
                **draw,
            )
        groups = range(config.num_groups)
        return torch.stack([random_gate(ids, keep=keep, group=group, **draw) for group in groups]), cut_BT
