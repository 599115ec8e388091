"""What a KV-Distill run can choose. Defaults are the paper's (arXiv 2503.10337) where it says, ours where it does not."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class KVDistillConfig:
    """Settings of the method, independent of model and trainer."""

    scorer_layer: int = 6
    """η: the scorer reads the hidden states that leave this many layers of the unmodified model; 1 or more (paper: 6)."""
    scorer_width: int = 0
    """Ours: width of the scorer's hidden layer; 0: the model's. With it, Llama-2-7B has the paper's 150 M trained parameters."""
    lora_rank: int = 128
    """r of the adapters on Q, K, V and O (paper: 128)."""
    lora_alpha: float = 128.0
    """Ours: α; an adapter's product is scaled by α/√r (rank-stabilised, as in the paper)."""
    routing: bool = True
    """Whether Q and O are adapted for chosen tokens alone (paper). False adapts them for all context tokens: an ablation."""
    distill_forward_share: float = 0.6
    """λ of λ·KL(teacher ‖ student) + (1 − λ)·KL(student ‖ teacher), in [0, 1] (paper: 0.6)."""
    keep_min: float = 0.001
    """Least kept fraction of a context in training, in (0, 1] (paper: 0.1 %)."""
    keep_max: float = 0.8
    """Largest kept fraction of a context in training, in (0, 1], at least `keep_min` (paper: 80 %). Ours: its logarithm is
    uniform between the two."""
    always_keep: int = 4
    """First tokens of a context that are always kept and never gated; 0 or more (paper: fewer than 10)."""
    keep_gate_at_inference: bool = False
    """Ours: whether a kept slot still weighs σ(score) when a cache is used. False: the unmodified model reads it, as in the
    paper, so a slot weighs more than in training unless its score is large."""
    dropped_slot_gradient: bool = False
    """Ours: whether the scorer also gets the gradient of slots that were not chosen. False: of chosen ones alone (paper)."""
    gate_gradient_cap: float = 3.0
    """Logarithm of the most that a dropped slot may weigh in its gate's gradient, 0 to 80; see KVCatConfig."""
    context_window: int = 1536
    """A longer context is cut into parts of so many tokens, compressed side by side in the batch, and laid end to end (paper)."""
    seed: int = 1234
    """Seed of the scorer's and the adapters' initialisation and of the kept fractions."""

    def __post_init__(self):
        self.validate()

    def validate(self) -> None:
        """Raise a ValueError that names the field, the value and the fix."""
        whole = {"scorer_layer": 1, "scorer_width": 0, "lora_rank": 1, "always_keep": 0, "context_window": 2}
        for name, least in whole.items():
            value = getattr(self, name)
            self._check(
                name,
                isinstance(value, int) and not isinstance(value, bool) and value >= least,
                f"give a whole number, {least} or more",
            )
        self._check("lora_alpha", 0 < self.lora_alpha < float("inf"), "give a positive number")
        self._check(
            "distill_forward_share",
            0 <= self.distill_forward_share <= 1,
            "give a share from 0 (KL(student ‖ teacher) alone) to 1 (KL(teacher ‖ student) alone)",
        )
        self._check("keep_min", 0 < self.keep_min <= 1, "give a fraction above 0, up to 1")
        self._check(
            "keep_max",
            self.keep_min <= self.keep_max <= 1,
            f"give a fraction from keep_min={self.keep_min} to 1",
        )
        self._check(
            "gate_gradient_cap",
            0 <= self.gate_gradient_cap <= 80,
            "give 0 to 80 logits (exp overflows float32 above)",
        )
        self._check(
            "context_window",
            self.context_window > self.always_keep,
            f"give more tokens than always_keep={self.always_keep}",
        )

    def check_layers(self, num_layers: int) -> None:
        """Raise a ValueError when the scorer would read behind the model's last layer."""
        self._check(
            "scorer_layer",
            self.scorer_layer <= num_layers,
            f"the model has {num_layers} layers; give at most that",
        )

    @property
    def lora_scale(self) -> float:
        """α/√r."""
        return self.lora_alpha / self.lora_rank**0.5

    def _check(self, name: str, good: bool, fix: str) -> None:
        if not good:
            raise ValueError(f"kvdistill.{name}={getattr(self, name)!r}: {fix}")
