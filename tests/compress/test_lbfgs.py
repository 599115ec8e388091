"""The batched optimiser against exact solutions and torch's own."""

from __future__ import annotations

import torch

from kvcat_nemo.compress.solvers.lbfgs import minimise


def differentiated(loss_of):
    def function(x):
        x = x.detach().requires_grad_(True)
        loss = loss_of(x)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), gradient

    return function


def test_quadratics_are_solved():
    torch.manual_seed(0)
    A = torch.randn(5, 12, 12, dtype=torch.float64)
    H = A @ A.transpose(1, 2) + 0.1 * torch.eye(12, dtype=torch.float64)
    c = torch.randn(5, 12, dtype=torch.float64)
    x, loss = minimise(
        differentiated(lambda x: 0.5 * torch.einsum("pn,pnm,pm->p", x, H, x) - (c * x).sum(-1)),
        torch.zeros(5, 12, dtype=torch.float64),
        iterations=120,
        history=20,
    )
    torch.testing.assert_close(x, torch.linalg.solve(H, c), rtol=1e-5, atol=1e-5)


def rosenbrock(x):
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(-1)


def test_rosenbrock_valleys_one_by_one_as_together():
    torch.manual_seed(1)
    start = torch.randn(4, 6, dtype=torch.float64)
    function = differentiated(rosenbrock)
    x, loss = minimise(function, start, iterations=200)
    # The valley has a second, local, bottom near x₁ = −1: a stationary point is asked for.
    assert float(function(x)[1].abs().max()) < 1e-3 and bool((loss <= 4).all())
    for p in range(4):
        alone, _ = minimise(function, start[p : p + 1], iterations=25)
        together, _ = minimise(function, start, iterations=25)
        torch.testing.assert_close(alone[0], together[p], rtol=1e-6, atol=1e-6)


def test_as_good_as_torchs_after_the_same_iterations():
    torch.manual_seed(2)
    q, y = torch.randn(60, 5, dtype=torch.float64), torch.randn(60, dtype=torch.float64)

    def loss_of(x):
        return ((q @ x.T).tanh() - y[:, None]).square().mean(0) + 0.01 * x.square().sum(-1)

    start = torch.randn(3, 5, dtype=torch.float64)
    _, loss = minimise(differentiated(loss_of), start, iterations=30)
    for p in range(3):
        x = start[p : p + 1].clone().requires_grad_(True)
        other = torch.optim.LBFGS([x], max_iter=30, history_size=8, line_search_fn="strong_wolfe")

        def closure(x=x, other=other):
            other.zero_grad()
            value = loss_of(x).sum()
            value.backward()
            return value

        other.step(closure)
        assert float(loss[p]) <= float(loss_of(x.detach())) * 1.001


def test_a_loss_never_rises_even_where_there_is_no_number():
    def loss_of(x):
        return torch.where(x.abs().amax(-1) > 2, torch.nan, (x**4 - x).sum(-1))

    start = torch.tensor([[1.9, -1.9], [0.1, 0.0], [2.0, 2.0]], dtype=torch.float64)
    function = differentiated(loss_of)
    x, loss = minimise(function, start, iterations=40, first_step=10.0)
    assert bool((loss <= function(start)[0]).all())
    torch.testing.assert_close(x, torch.full_like(x, 0.25 ** (1 / 3)), rtol=1e-4, atol=1e-4)


def test_a_finished_problem_stays_where_it_is():
    x, loss = minimise(lambda x: (x.square().sum(-1), 2 * x), torch.zeros(2, 3), iterations=5)
    assert torch.equal(x, torch.zeros(2, 3)) and torch.equal(loss, torch.zeros(2))
