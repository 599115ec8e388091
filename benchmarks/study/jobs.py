"""Which models are trained: policies at equal tokens, and ablations that change one factor each."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.study.scales import Scale, Training


@dataclass(frozen=True)
class Job:
    """One training run, which starts from the base model."""

    name: str
    """Of its folder, and of its model in results."""
    group: str
    """Runs that differ in the seed alone; what means and spreads are taken over."""
    kvcat: dict
    """KVCatConfig fields."""
    seed: int
    training: Training


@dataclass(frozen=True)
class Ablation:
    """One factor changed against the study's router policy."""

    factor: str
    change: dict


ABLATIONS = {
    "default": Ablation("none", {}),
    "no gradient to dropped slots": Ablation("gate gradient", {"dropped_slot_gradient": False}),
    "jitter 0.02": Ablation("router start", {"router_init_jitter": 0.02}),
    "4 sinks": Ablation("always visible", {"sinks": 4}),
    "window 16": Ablation("always visible", {"recent_window": 16}),
    "dense input": Ablation("router input", {"router_input": "dense"}),
    "input not detached": Ablation("router input", {"router_detach_input": False}),
    "target 0.3": Ablation("target", {"target_keep_fraction": 0.3}),
    "target 0.7": Ablation("target", {"target_keep_fraction": 0.7}),
    "reverse KL": Ablation("KL direction", {"distill_forward_share": 0.0}),
    "distill 0.3": Ablation("distill weight", {"distill_weight": 0.3}),
    "distill 1": Ablation("distill weight", {"distill_weight": 1.0}),
    "mask per KV head": Ablation("mask", {"mask_per": "kv_head"}),
    "1 group": Ablation("groups", {"num_groups": 1}),
    "2 groups": Ablation("groups", {"num_groups": 2}),
    "a group per layer": Ablation("groups", {"num_groups": -1}),
    # Short of time, one setting of every factor is above.
    "cap 3": Ablation("gate gradient", {"gate_gradient_cap": 3.0}),
    "the paper's start": Ablation("router start", {"router_init_keep": 1.0, "router_init_jitter": 0.02}),
    "KV-Distill's mixture": Ablation("KL direction", {"distill_forward_share": 0.6}),
    "distill 3": Ablation("distill weight", {"distill_weight": 3.0}),
    "budget 0.1": Ablation("budget weight", {"budget_weight": 0.1}),
    "budget 10": Ablation("budget weight", {"budget_weight": 10.0}),
}


def _settings(scale: Scale, policy: str) -> dict:
    """The router's settings; of them the weight of the distillation is that of every policy with a masked pass."""
    if policy == "router":
        return scale.router
    return {k: v for k, v in scale.router.items() if k == "distill_weight" and policy != "none"}


def policy_jobs(scale: Scale) -> list[Job]:
    """Continued pretraining under every policy and seed. Short of time, what matters is there: all seeds of the control
    and of the router, in turns, before the other policies."""
    compared = {policy: seeds for policy, seeds in scale.seeds.items() if policy in ("none", "router")}
    others = {policy: seeds for policy, seeds in scale.seeds.items() if policy not in compared}
    return [
        Job(
            name=f"{policy}-seed{seeds[number]}",
            group=policy,
            kvcat={"policy": policy} | _settings(scale, policy),
            seed=seeds[number],
            training=scale.continued,
        )
        for part in (compared, others)
        for number in range(max(map(len, part.values()), default=0))
        for policy, seeds in part.items()
        if number < len(seeds)
    ]


def ablation_jobs(scale: Scale) -> list[Job]:
    """Shorter runs, one factor changed in each."""
    if scale.ablation is None:
        return []
    names = scale.ablations or tuple(ABLATIONS)
    out = []
    for seed in scale.ablation_seeds:
        for name in names:
            ablation = ABLATIONS[name]
            kvcat = {"policy": "router"} | scale.router | ablation.change
            if kvcat.get("num_groups") == -1:
                kvcat["num_groups"] = scale.shape.layers
            slug = name.replace(" ", "-").replace("'", "")
            out.append(Job(f"ablation-{slug}-seed{seed}", f"ablation: {name}", kvcat, seed, scale.ablation))
    return out
