"""The losses against PyTorch's own, their gradients and their signs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.losses import budget_loss, distillation, kl_teacher_student, kvcat_loss, next_token_ce


def logits(seed=0, shape=(2, 3, 7)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor([[0, 6, 3], [2, 2, 5]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kl_is_torchs_forward_kl_times_temperature_squared(temperature):
    teacher, student = logits(0), logits(1)
    expected = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    got = kl_teacher_student(teacher, student, temperature)
    torch.testing.assert_close(got, temperature**2 * expected, rtol=0, atol=1e-12)
    reverse = kl_teacher_student(student, teacher, temperature)
    assert (got - reverse).abs().min() > 1e-3  # the direction is seen
    assert got.min() > 0
    assert kl_teacher_student(teacher, teacher, temperature).abs().max() < 1e-12


def test_kl_has_no_gradient_to_the_teacher_and_the_right_one_to_the_student():
    teacher, student = logits(0).requires_grad_(), logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kl_teacher_student(teacher.detach(), s, 1.7), (student,))
    kl_teacher_student(teacher, student).sum().backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, student.softmax(-1) - teacher.softmax(-1))


def test_cross_entropy():
    x = logits().requires_grad_()
    got = next_token_ce(x, LABELS)
    expected = -x.log_softmax(-1).gather(-1, LABELS[..., None])[..., 0]
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda y: next_token_ce(y, LABELS), (x,))


def budget(p, keep):
    return budget_loss(p, (p > 0.5).to(p.dtype), keep)


@given(keep=st.floats(0.05, 0.95), hard=st.floats(0, 1), soft=st.floats(0, 1))
def test_budget_is_the_formula(keep, hard, soft):
    F_, G = torch.tensor([hard], dtype=torch.float64), torch.tensor([soft], dtype=torch.float64)
    expected = hard * soft / keep + (1 - hard) * (1 - soft) / (1 - keep)
    assert math.isclose(budget_loss(G, F_, keep).item(), expected, rel_tol=1e-12)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_budget_is_one_at_its_target_and_has_no_gradient_there(keep):
    hard = (torch.arange(8) < 8 * keep).double()
    p = torch.full((8,), keep, dtype=torch.float64, requires_grad=True)
    loss = budget_loss(p, hard, keep)
    assert math.isclose(loss.item(), 1, rel_tol=1e-12)
    loss.backward()
    assert p.grad.abs().max() < 1e-12


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
def test_budget_pushes_down_when_too_much_is_kept_and_up_when_too_little(keep):
    p = torch.linspace(0.3, 0.7, 8, dtype=torch.float64, requires_grad=True)
    for kept, sign in ((8 * keep + 1, 1), (8 * keep - 1, -1), (8, 1), (0, -1)):
        hard = (torch.arange(8) < kept).double().requires_grad_()
        (grad,) = torch.autograd.grad(budget_loss(p, hard, keep), p)
        assert (grad.sign() == sign).all(), kept
        fraction = hard.detach().mean()
        expected = (fraction / keep - (1 - fraction) / (1 - keep)) / 8
        torch.testing.assert_close(grad, expected.expand(8))


def test_budget_gradient_equals_finite_differences_and_reaches_p_alone():
    hard = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    p = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: budget_loss(x, hard.detach(), 0.3), (p,))
    budget_loss(p, hard, 0.3).backward()
    assert hard.grad is None


def test_parts_are_named_raw_and_weighted_and_sum_up():
    config = KVCatConfig(distill_weight=2.0, budget_weight=0.5, anchor_weight=3.0)
    parts = kvcat_loss(torch.tensor(1.0), torch.tensor(10.0), [torch.tensor(4.0), torch.tensor(6.0)], config)
    assert {k: v.item() for k, v in parts.raw.items()} == {"anchor": 1, "distill": 10, "budget": 5}
    assert {k: v.item() for k, v in parts.weighted.items()} == {"anchor": 3, "distill": 20, "budget": 2.5}
    assert parts.total == 25.5


def test_parts_that_a_policy_lacks_are_left_out():
    parts = kvcat_loss(torch.tensor(1.0), None, [], KVCatConfig(policy="none"))
    assert set(parts.raw) == set(parts.weighted) == {"anchor"} and parts.total == 1


def test_default_weights_are_the_papers():
    config = KVCatConfig()
    assert (config.distill_weight, config.budget_weight, config.anchor_weight) == (1.0, 0.1, 1.0)
    assert (config.target_keep_fraction, config.num_groups, config.router_dim) == (0.5, 4, 64)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_distillation_mixes_torchs_kl_of_both_directions(share):
    teacher, student = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    kl = lambda a, b: torch.nn.functional.kl_div(b, a, log_target=True, reduction="none").sum(-1)  # noqa: E731
    expected = share * kl(p, q) + (1 - share) * kl(q, p)
    torch.testing.assert_close(distillation(teacher, student, 1.0, share), expected)
