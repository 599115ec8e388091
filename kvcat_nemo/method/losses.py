"""The three losses as pure functions with named parts (arXiv 2605.05971). Shapes: B batch, T tokens, V vocabulary.

L = w_distill·KL(stopgrad(dense) ‖ masked) + w_budget·L_budget + w_anchor·CE(dense, next token)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.method.config import KVCatConfig


@dataclass
class LossParts:
    """Raw and weighted parts by name, and the sum of the weighted ones."""

    raw: dict[str, Tensor]
    weighted: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        return sum(self.weighted.values())


def next_token_ce(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, [B, T]; labels are already shifted."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none").view(
        labels_BT.shape
    )


def kl_teacher_student(teacher_BTV: Tensor, student_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of each token in nats ("forward"), [B, T]; no gradient reaches the teacher."""
    p = (teacher_BTV.detach() / temperature).log_softmax(-1)
    q = (student_BTV / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def distillation(
    teacher_BTV: Tensor, student_BTV: Tensor, temperature: float = 1.0, forward_share: float = 1.0
) -> Tensor:
    """λ·KL(teacher ‖ student) + (1 − λ)·KL(student ‖ teacher) of each token, [B, T]; λ = 1 is KV-CAT's, 0.6 KV-Distill's."""
    forward = kl_teacher_student(teacher_BTV, student_BTV, temperature)
    p = (teacher_BTV.detach() / temperature).log_softmax(-1)
    q = (student_BTV / temperature).log_softmax(-1)
    reverse = temperature**2 * (q.exp() * (q - p)).sum(-1)
    return forward_share * forward + (1 - forward_share) * reverse


def budget_loss(p: Tensor, hard: Tensor, keep: float) -> Tensor:
    """F·G/ρ + (1−F)(1−G)/(1−ρ) with F = mean(hard), G = mean(p): 1 at F = G = ρ.

    Its gradient in G is F/ρ − (1−F)/(1−ρ): it pushes probabilities down while more than ρ is kept and up while less
    is. The gradient reaches p alone.

    Args:
        p: keep probabilities of one router and micro-batch, any shape; hard: the gates 1{p > ½}.
        keep: ρ.
    """
    return budget_of_means(hard.detach().mean(), p.mean(), keep)


def budget_of_means(kept: Tensor, probability: Tensor, keep: float) -> Tensor:
    """`budget_loss` from F = `kept` and G = `probability`, wherever their tokens are."""
    return kept * probability / keep + (1 - kept) * (1 - probability) / (1 - keep)


def kvcat_loss(
    anchor: Tensor, distill: Tensor | None, budgets: list[Tensor], config: KVCatConfig
) -> LossParts:
    """Weigh the three terms.

    Args:
        anchor: mean cross-entropy of the dense pass; distill: mean KL, or None when there is no masked pass.
        budgets: one budget loss per router (empty for policies without one).
    """
    raw = {"anchor": anchor}
    weights = config.gate_policy.loss_weights(config)
    if distill is not None:
        raw["distill"] = distill
    if budgets:
        raw["budget"] = sum(budgets) / len(budgets)
    return LossParts(raw, {name: weights[name] * value for name, value in raw.items()})
