"""The router: its equations, its initialisation, straight-through, causality, float32, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.linear_attention import quadratic_linear_attention
from kvcat_nemo.method.router import Router, Routing, elu_plus_one

WIDTH = 12


def make(dtype=torch.float64, width=WIDTH, group=0, **kvcat):
    """A router in float64 for checks: `.double()` would leave it in float32, on purpose."""
    router = Router(width, KVCatConfig(router_dim=5, **kvcat), group)
    for parameter in router.parameters():
        parameter.data = parameter.data.to(dtype)
    return router


def make_lively(**kvcat):
    """One in the middle of training: α ≠ 0, W_P anything, so that p lies on both sides of ½."""
    router = make(**kvcat)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        router.alpha.fill_(0.7)
        router.proposal.weight.copy_(torch.randn(WIDTH, WIDTH, generator=rng, dtype=torch.float64))
        router.norm.weight.copy_(1 + 0.3 * torch.randn(WIDTH, generator=rng, dtype=torch.float64))
        router.norm.bias.copy_(0.3 * torch.randn(WIDTH, generator=rng, dtype=torch.float64))
    return router


def hidden(B=2, T=11, width=WIDTH, seed=1, dtype=torch.float64):
    return torch.randn(B, T, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_equations():
    """p written out per token from METHOD's equations, by the quadratic form."""
    router, h = make_lively(), hidden()
    x = F.layer_norm(h, (WIDTH,), router.norm.weight, router.norm.bias, router.norm.eps)
    q, k, r = x @ router.q.weight.T, x @ router.k.weight.T, x @ router.v.weight.T
    phi = lambda y: torch.where(y > 0, y + 1, y.exp())  # noqa: E731
    a = quadratic_linear_attention(phi(q), phi(k), r) @ router.o.weight.T
    u, w = h @ router.proposal.weight.T, h + 0.7 * a
    p = (1 - (u * w).sum(-1) / u.norm(dim=-1) / w.norm(dim=-1)) / 2
    routing = router(h)
    torch.testing.assert_close(routing.p_BT, p, rtol=0, atol=1e-12)
    assert torch.equal(routing.hard_BT, (p > 0.5).double())
    assert 0 < routing.hard_BT.mean() < 1


def test_feature_map_is_never_negative():
    x = torch.linspace(-40, 40, 1001)
    assert (elu_plus_one(x) >= 0).all() and (elu_plus_one(x[x > -10]) > 0).all()
    assert elu_plus_one(torch.zeros(())) == 1


def test_gradients_equal_finite_differences():
    router, h = make_lively(), hidden(1, 5).requires_grad_()
    names, leaves = zip(*router.named_parameters(), strict=True)

    def p(h, *values):
        return torch.func.functional_call(router, dict(zip(names, values, strict=True)), h).p_BT

    assert torch.autograd.gradcheck(p, (h, *[x.detach().clone().requires_grad_() for x in leaves]))


def test_straight_through():
    """The gate's value is exactly 0 or 1, its gradient is that of p."""
    router, h = make_lively(), hidden(dtype=torch.float32)
    for parameter in router.parameters():
        parameter.data = parameter.data.float()
    routing = router(h)
    assert set(routing.gate_BT.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(routing.gate_BT.detach(), routing.hard_BT)
    assert not routing.hard_BT.requires_grad
    weight = torch.randn_like(routing.p_BT)
    parameters = list(router.parameters())
    through = torch.autograd.grad((routing.gate_BT * weight).sum(), parameters, retain_graph=True)
    direct = torch.autograd.grad((routing.p_BT * weight).sum(), parameters)
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(through, direct, strict=True))


def test_exactly_half_is_dropped():
    """m = 1{p > ½}, strictly: a zero hidden state has cosine 0."""
    assert make()(torch.zeros(1, 3, WIDTH, dtype=torch.float64)).hard_BT.sum() == 0


def test_gate_of_any_probability_is_exact():
    p = torch.rand(10_000, dtype=torch.float32, requires_grad=True)
    gate = Routing(p, (p > 0.5).float()).gate_BT
    assert set(gate.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("position", [1, 6, 10])
def test_a_later_token_never_changes_an_earlier_gate(position):
    router, h = make_lively(), hidden(dtype=torch.float32)
    for parameter in router.parameters():
        parameter.data = parameter.data.float()
    before = router(h)
    h2 = h.clone()
    h2[:, position] = 50 * hidden(2, 1, seed=9, dtype=torch.float32)[:, 0]
    after = router(h2)
    assert torch.equal(after.p_BT[:, :position], before.p_BT[:, :position])
    assert not torch.equal(after.p_BT[:, position:], before.p_BT[:, position:])


def test_an_earlier_token_reaches_later_gates_only_through_alpha():
    router, h = make_lively(), hidden()
    h2 = h.clone()
    h2[:, 0] += 1
    assert not torch.equal(router(h2).p_BT[:, 1:], router(h).p_BT[:, 1:])
    router.alpha.data.zero_()
    assert torch.equal(router(h2).p_BT[:, 1:], router(h).p_BT[:, 1:])


def test_initialisation_is_the_papers():
    router = make(router_init_jitter=0.0, router_init_keep=1.0)
    assert torch.equal(router.proposal.weight, -torch.eye(WIDTH, dtype=torch.float64))
    assert router.alpha == 0
    routing = router(hidden())
    torch.testing.assert_close(routing.p_BT, torch.ones_like(routing.p_BT), rtol=0, atol=1e-14)
    assert routing.hard_BT.mean() == 1
    # At cosine −1 its gradient is zero but for rounding: the reason for the jitter.
    grads = torch.autograd.grad(routing.p_BT.sum(), list(router.parameters()), allow_unused=True)
    assert max(g.abs().max() for g in grads if g is not None) < 1e-13


def test_jitter_opens_the_gradient_and_keeps_everything():
    router = make(router_init_jitter=0.02)
    routing = router(hidden())
    assert routing.hard_BT.mean() == 1 and (routing.p_BT > 0.99).all() and (routing.p_BT < 1).all()
    routing.p_BT.sum().backward()
    assert router.proposal.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("keep", [0.5, 0.55, 0.75, 0.9, 1.0])
def test_every_token_starts_at_the_asked_probability(keep):
    router = make(router_init_jitter=0.0, router_init_keep=keep)
    p = router(100 * hidden()).p_BT
    torch.testing.assert_close(p, torch.full_like(p, keep), rtol=0, atol=1e-7)  # W_P is made in float32


def test_away_from_one_the_start_has_a_gradient_without_jitter():
    router = make(router_init_jitter=0.0, router_init_keep=0.75)
    router(hidden()).p_BT.sum().backward()
    assert router.proposal.weight.grad.abs().max() > 1e-2


def test_jitter_is_relative_to_the_width():
    router = Router(256, KVCatConfig(router_init_jitter=0.5), 0)
    noise = router.proposal.weight + torch.eye(256)
    assert abs(noise.std().item() * math.sqrt(256) - 0.5) < 0.01


def test_odd_width_is_refused():
    with pytest.raises(ValueError, match="hidden_size=7.*even"):
        Router(7, KVCatConfig(), 0)


def test_initialisation_depends_on_seed_and_group_alone():
    torch.manual_seed(0)
    first = Router(8, KVCatConfig(seed=3), 1).state_dict()
    torch.manual_seed(99)
    torch.randn(3)
    state = torch.get_rng_state()
    again = Router(8, KVCatConfig(seed=3), 1).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    for other in (Router(8, KVCatConfig(seed=4), 1), Router(8, KVCatConfig(seed=3), 2)):
        assert not torch.equal(other.q.weight, first["q.weight"])
    assert state.shape == torch.get_rng_state().shape


def test_stays_in_float32_and_moves_between_devices():
    model = torch.nn.ModuleDict({"router": Router(8, KVCatConfig(), 0), "linear": torch.nn.Linear(8, 8)})
    values = {k: v.clone() for k, v in model["router"].state_dict().items()}
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
    ):
        cast(model)
        assert {p.dtype for p in model["router"].parameters()} == {torch.float32}
    assert model["linear"].weight.dtype == torch.float64  # what is around it does follow
    assert all(torch.equal(values[k], v) for k, v in model["router"].state_dict().items())
    model.to("meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model["router"].parameters()} == {("meta", torch.float32)}


def test_computes_in_float32_on_half_precision_hidden_states_and_under_autocast():
    router = Router(8, KVCatConfig(), 0)
    h = hidden(width=8, dtype=torch.bfloat16)
    expected = router(h.float()).p_BT
    assert torch.equal(router(h).p_BT, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(h).p_BT, expected)


def test_without_gradient_to_dropped_slots_kept_ones_alone_have_it():
    p = torch.linspace(0.1, 0.9, 9, dtype=torch.float64).requires_grad_()
    hard = (p > 0.5).double().detach()
    (cut,) = torch.autograd.grad(Routing(p, hard, dropped_gradient=False).gate_BT.sum(), p)
    (whole,) = torch.autograd.grad(Routing(p, hard).gate_BT.sum(), p)
    assert torch.equal(cut, hard) and torch.equal(whole, torch.ones_like(p))


def test_a_mask_per_kv_head_is_as_many_routers_of_one_linear_attention():
    """Each head's probabilities are those of a router with that head's W_P alone."""
    config = KVCatConfig(router_dim=5, mask_per="kv_head", router_init_keep=0.6, router_init_jitter=1.0)
    many = Router(WIDTH, config, group=0, kv_heads=3).double()
    for parameter in many.parameters():
        parameter.data = parameter.data.double()
    with torch.no_grad():
        many.alpha.fill_(0.7)
    one = make_lively()
    h = hidden(2, 7)
    routing = many(h)
    assert routing.p_BT.shape == (2, 7, 3)
    for head in range(3):
        state = many.state_dict()
        state["proposal.weight"] = state["proposal.weight"][head * WIDTH : (head + 1) * WIDTH]
        one.load_state_dict(state)
        torch.testing.assert_close(routing.p_BT[..., head], one(h).p_BT, rtol=1e-13, atol=1e-13)
    assert not torch.equal(routing.hard_BT[..., 0], routing.hard_BT[..., 1])


def test_a_mask_per_kv_head_must_know_their_number():
    with pytest.raises(ValueError, match="mask_per"):
        Router(WIDTH, KVCatConfig(router_dim=4, mask_per="kv_head"), group=0)
