"""Policies by name: each is one file of this folder. To add one, write its file and give it a place in POLICIES.

| policy      | mask                                                            | gradient |
|-------------|-----------------------------------------------------------------|----------|
| `router`    | proposed by a router per layer group (method/router.py)         | yes      |
| `random`    | each slot kept with probability ρ, per token and layer group;   | no       |
|             | with `mask_span=prefix` behind a cut alone, ρ of each window    |          |
| `attention` | the ρ·T slots with most accumulated attention, per layer (H2O)  | no       |
| `scorer`    | chosen by KV-Distill's scorer (method/kvdistill), behind a cut  | yes      |
| `none`      | no masked pass                                                  | —        |
"""

from kvcat_nemo.method.policies.attention_gates import AttentionPolicy
from kvcat_nemo.method.policies.dense_only import DenseOnly
from kvcat_nemo.method.policies.policy import Policy, Range
from kvcat_nemo.method.policies.random_gates import RandomPolicy
from kvcat_nemo.method.policies.router_gates import RouterPolicy
from kvcat_nemo.method.policies.scorer_gates import ScorerPolicy

__all__ = ["POLICIES", "Policy", "Range"]

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (RouterPolicy(), RandomPolicy(), AttentionPolicy(), ScorerPolicy(), DenseOnly())
}
