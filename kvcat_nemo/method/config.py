"""What a KV-CAT run can choose. Defaults are the paper's (arXiv 2605.05971) where it says, ours where it does not."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from kvcat_nemo.method.policies import POLICIES, Policy


@dataclass
class KVCatConfig:
    """Settings of the method, independent of model and trainer."""

    policy: str = "router"
    """What decides which KV slots the masked pass may see, a name of method.policies; `none` trains on the dense pass alone."""
    target_keep_fraction: float = 0.5
    """ρ: the fraction of KV slots the masked pass keeps, in (0, 1)."""
    num_groups: int = 4
    """Layer groups; the first layer of each owns the router whose mask the whole group shares."""

    distill_weight: float = 1.0
    """Weight of KL(stopgrad(dense) ‖ masked), mean over tokens."""
    budget_weight: float = 0.1
    """Weight of the budget loss, averaged over routers."""
    anchor_weight: float = 1.0
    """Weight of the dense pass' next-token cross-entropy."""
    distill_temperature: float = 1.0
    """Softmax temperature τ of both sides of the KL (the KL is multiplied by τ²)."""
    distill_forward_share: float = 1.0
    """λ of λ·KL(dense ‖ masked) + (1 − λ)·KL(masked ‖ dense): 1 is KV-CAT's; KV-Distill's (arXiv 2503.10337) is 0.6."""
    loss_memory_mib: int = 0
    """MiB for the logits of a chunk of tokens; those of all tokens are never formed. 0: 128 on a CPU, 2048 on a GPU."""

    loss_kernel: str = "auto"
    """What turns logits into losses and gradients: auto, torch, or triton (on CUDA; auto tries it on a small case first)."""

    router_dim: int = 64
    """Width of the router's causal linear attention."""
    router_input: Literal["masked", "dense"] = "masked"
    """Which stream's hidden states the router reads."""
    router_detach_input: bool = False
    """Cut the gradient from the router into the backbone."""
    router_init_keep: float = 1.0
    """Keep probability of every token at step 0, in [0.5, 1]; 1 is the paper's W_P = −I."""
    router_init_jitter: float = 0.02
    """Standard deviation, times 1/√width, of the noise on W_P that breaks the zero gradient at p = 1."""
    mask_per: Literal["token", "kv_head"] = "token"
    """Whether a router's mask is shared by the KV heads (the paper's) or proposed for each, by a W_P of its own."""
    router_lr_mult: float = 1.0
    """Learning rate of the routers over that of the backbone."""

    mask_span: Literal["window", "prefix"] = "window"
    """Which queries a mask applies to: every later one (`window`, KV-CAT's), or those behind a cut alone (`prefix`): rows
    before the cut compute a prefix with full attention, as every compressor meets it, and rows behind it read the prefix
    through the mask, and one another plainly. The cut is drawn for each window. `random` alone."""
    prefix_keep_min: float = 0.03
    """Least fraction of a prefix's slots that is kept, in (0, 1]. It is drawn for each window, its logarithm uniformly:
    compressors keep a few percent to some tens of percent, and each decade then gets its share of windows."""
    prefix_keep_max: float = 0.4
    """Largest fraction of a prefix's slots that is kept, in (0, 1], at least `prefix_keep_min`."""
    prefix_cut_multiple: int = 1
    """Cuts lie at multiples of so many tokens, 1 or more, counted from where the document begins; a document that is no longer
    is not cut. A kernel that plans for each shape (cuDNN does) meets as many shapes as there are places for a cut."""

    sinks: int = 0
    """First slots that every query always sees."""
    recent_window: int = 1
    """Last slots that a query always sees; 1 is its own slot."""
    dropped_slot_gradient: bool = True
    """Whether the gradient reaches the gates of dropped slots; without it, the budget loss alone brings a slot back."""
    gate_gradient_cap: float = 3.0
    """Logarithm of the most that a dropped slot may weigh in the gradient of its gate.

    A slot's weight in a row is e^logit over the row's visible ones together; it is summed over the queries that see the
    slot through its gate (mean over the query heads of its KV head). Where the sum exceeds e^cap, the slot's gradient is
    scaled down by the ratio; below, it is exact. Dropped attention sinks exceed visible slots by tens of logits. With 30, an untrained router's gradient norm was 10⁴ on SmolLM2-135M, and
    clipping left the backbone no step (docs/LOG.md).
    """
    attention_backend: str = "auto"
    """Fused kernel that computes attention: auto, cpu, te, flash, torch, or oracle (dense float64, for tests)."""
    seed: int = 1234
    """Seed of router initialisation and of the random policy."""

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """Raise a ValueError that names the field, the value and the fix."""
        choices = ", ".join(name for name, policy in POLICIES.items() if not policy.own_model)
        _check(self, "policy", self.policy in POLICIES, f"choose one of {choices}")
        _one_of(self, "mask_per", ("token", "kv_head"))
        _one_of(self, "loss_kernel", ("auto", "torch", "triton"))
        _one_of(self, "attention_backend", ("auto", "cpu", "te", "flash", "torch", "oracle"))
        _check(
            self,
            "target_keep_fraction",
            0 < self.target_keep_fraction < 1,
            "give a fraction between 0 and 1, such as 0.5",
        )
        _check(self, "num_groups", self.num_groups >= 1, "give at least 1")
        _check(self, "distill_temperature", self.distill_temperature > 0, "give a positive temperature")
        _check(
            self,
            "distill_forward_share",
            0 <= self.distill_forward_share <= 1,
            "give a share from 0 (reverse) to 1 (forward)",
        )
        _check(
            self,
            "mask_per",
            self.mask_per in self.gate_policy.masks_per,
            f"the policy {self.policy!r} makes one mask for all heads; give token",
        )
        _one_of(self, "mask_span", ("window", "prefix"))
        _check(
            self,
            "mask_span",
            self.mask_span in self.gate_policy.mask_spans,
            _span_fix(self.gate_policy),
        )
        _check(self, "loss_memory_mib", self.loss_memory_mib >= 0, "give 1 MiB or more, or 0 for the default")
        _check(self, "sinks", self.sinks >= 0, "give 0 or more slots")
        _check(
            self,
            "recent_window",
            self.recent_window >= 1,
            "give at least 1: a query always sees its own slot",
        )
        _check(
            self,
            "recent_window",
            self.recent_window == 1 or self.mask_span == "window",
            "with mask_span=prefix a query sees all slots behind the cut; give 1",
        )
        _check(
            self,
            "gate_gradient_cap",
            0 <= self.gate_gradient_cap <= 80,
            "give 0 to 80 logits (exp overflows float32 above)",
        )
        for name in ("distill_weight", "budget_weight", "anchor_weight"):
            _check(self, name, getattr(self, name) >= 0, "give a weight of 0 or more")
        for (
            policy
        ) in POLICIES.values():  # each one's settings, so that a bad value does not wait for another policy
            for name, values in policy.settings.items():
                _check(self, name, values.holds(self), values.fix.format_map(vars(self)))
        self.gate_policy.refuse(self)

    @property
    def gate_policy(self) -> Policy:
        """The policy that `policy` names."""
        return POLICIES[self.policy]

    @property
    def masks_prefix(self) -> bool:
        """Whether masks apply to rows behind a cut alone."""
        return self.paired and self.mask_span == "prefix"

    @property
    def paired(self) -> bool:
        """Whether a masked pass runs beside the dense one."""
        return self.gate_policy.paired

    def group_starts(self, num_layers: int) -> tuple[int, ...]:
        """Layers (counted from 0) that begin a group: 0, 6, 12, 18 for 24 layers in four groups."""
        _check(
            self,
            "num_groups",
            self.num_groups <= num_layers,
            f"give at most the number of layers, {num_layers}",
        )
        return tuple(i * num_layers // self.num_groups for i in range(self.num_groups))

    def group_of_layer(self, layer: int, num_layers: int) -> int:
        """Index of the group that `layer` (counted from 0) belongs to."""
        return sum(start <= layer for start in self.group_starts(num_layers)) - 1


def keep_target(settings: Mapping[str, Any]) -> float | None:
    """The keep rate that a run aims at, of a KVCatConfig's fields as a run records them; None where there is no such number.

    Records of before `mask_span` have masks for whole windows; the policy of a record may be unknown here.
    """
    return POLICIES.get(settings.get("policy", ""), Policy()).target_keep(settings)


def _span_fix(policy: Policy) -> str:
    if "window" not in policy.mask_spans:
        return f"gates of the policy {policy.name!r} hide slots from rows behind a cut alone; give prefix"
    others = [p.name for p in POLICIES.values() if p.paired and not p.own_model and "prefix" in p.mask_spans]
    return (
        f"gates of the policy {policy.name!r} hide a slot from every later query; give window, or "
        f"policy={' or '.join(others)}"
    )


def _check(config: KVCatConfig, name: str, good: bool, fix: str) -> None:
    assert name in {f.name for f in fields(config)}
    if not good:
        raise ValueError(f"kvcat.{name}={getattr(config, name)!r}: {fix}")


def _one_of(config: KVCatConfig, name: str, choices: tuple[str, ...]) -> None:
    _check(config, name, getattr(config, name) in choices, f"choose one of {', '.join(choices)}")
