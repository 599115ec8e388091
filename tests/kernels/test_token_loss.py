"""The losses from hidden states against the method's own on plain logits. (Split vocabularies: test_token_loss_split.)"""

import os
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvcat_nemo.kernels.losses import token_loss
from kvcat_nemo.kernels.losses.token_loss import TOKEN_METRICS, token_losses
from kvcat_nemo.method.losses import distillation, next_token_ce


def case(T=5, B=2, V=30, M=6, paired=True, seed=0, dtype=torch.float64, spread=2.0):
    """Hidden states, output weight, labels, token weights."""
    rng = torch.Generator().manual_seed(seed)
    passes = 1 + paired
    hidden = torch.randn(T, passes * B, M, generator=rng, dtype=torch.float64)
    weight = torch.randn(V, M, generator=rng, dtype=torch.float64) * spread * M**-0.5
    labels = torch.randint(0, V, (B, T), generator=rng)
    weights = torch.rand(passes, B, T, generator=rng, dtype=torch.float64)
    weights[:, torch.rand(B, T, generator=rng) < 0.2] = 0  # hidden by a loss mask
    return hidden.to(dtype), weight.to(dtype), labels, weights


def plain(hidden, weight, labels, temperature=1.0, paired=True, forward_share=1.0):
    """[4, B, T] of the method's functions on the logits of all tokens."""
    x = (hidden @ weight.t()).transpose(0, 1)
    if not paired:
        return next_token_ce(x, labels)[None]
    dense, masked = x.chunk(2)
    agree = (dense.argmax(-1) == masked.argmax(-1)).to(x.dtype)
    kl = distillation(dense, masked, temperature, forward_share)
    return torch.stack([next_token_ce(dense, labels), kl, next_token_ce(masked, labels).detach(), agree])


def differentiate(losses, hidden, weight, weights, factor=1.0):
    """Metrics and the gradients of factor·Σ weights·(CE, KL)."""
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    out = losses(*leaves)
    loss = factor * (out[: len(weights)] * weights.to(out.dtype)).sum()
    return out.detach(), *torch.autograd.grad(loss, leaves)


def distance(a, b):
    """‖a − b‖ / ‖b‖ in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture
def sweeps(monkeypatch):
    """Grows by one at every sweep over the vocabulary: whether it made gradients."""
    seen = []

    def counted(*args, **kwargs):
        out = real(*args, **kwargs)
        seen.append(any(x is not None for x in out[1:]))
        return out

    real = token_loss.sweep
    monkeypatch.setattr(token_loss, "sweep", counted)
    return seen


# Triton's interpreter is slow: test_token_loss_triton.py asks for fewer.
@settings(max_examples=int(os.environ.get("EXAMPLES", 30)), deadline=None)
@given(
    T=st.integers(1, 9),
    B=st.integers(1, 3),
    V=st.integers(2, 40),
    M=st.integers(1, 5),
    padding=st.integers(0, 5),
    memory=st.sampled_from([0.0001, 0.001, 0.003, 1]),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 4.0]),
    share=st.sampled_from([1.0, 0.6, 0.0]),
    paired=st.booleans(),
    known=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_in_float64(
    T, B, V, M, padding, memory, temperature, share, paired, known, seed
):
    hidden, weight, labels, weights = case(T, B, V, M, paired, seed)
    weights[:, 0, 0] = 0.5
    # Rows of padding would give the largest logits of all: whatever leaks is seen.
    padded = torch.cat([weight, torch.full((padding, M), 50.0, dtype=weight.dtype)])
    settings = dict(vocab_size=V, paired=paired, temperature=temperature, memory_mib=memory)
    settings |= {"loss_weights": weights if known else None, "forward_share": share}
    out, dh, dw = differentiate(
        lambda h, w: token_losses(h, w, labels, **settings), hidden, padded, weights, 0.3
    )
    expected = differentiate(
        lambda h, w: plain(h, w, labels, temperature, paired, share), hidden, weight, weights, 0.3
    )
    for ours, theirs in zip((out, dh, dw[:V]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (dw[V:] == 0).all()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_float32_is_as_close_to_float64_as_rounding_lets_it(known, temperature):
    hidden, weight, labels, weights = case(T=24, V=8_000, M=64, spread=3.0)
    exact = differentiate(lambda h, w: plain(h, w, labels, temperature), hidden, weight, weights)
    narrow = [x.float() for x in (hidden, weight)]
    options = dict(temperature=temperature, memory_mib=2, loss_weights=weights if known else None)
    ours = differentiate(lambda h, w: token_losses(h, w, labels, **options), *narrow, weights)
    for row in range(3):
        assert distance(ours[0][row], exact[0][row]) < 2e-6, TOKEN_METRICS[row]
    assert torch.equal(ours[0][3].double(), exact[0][3])
    assert distance(ours[1], exact[1]) < 2e-6 and distance(ours[2], exact[2]) < 2e-6


@pytest.mark.parametrize("known", [True, False])
def test_bfloat16_is_computed_in_float32(known):
    """Off by the rounding of logits and of their gradients, as a plain bf16 output layer is; sums are wide."""
    hidden, weight, labels, weights = case(T=24, V=3000, M=64, dtype=torch.bfloat16)
    exact = differentiate(lambda h, w: plain(h, w, labels), hidden.double(), weight.double(), weights)
    for memory in (0.1, 100):
        options = dict(memory_mib=memory, loss_weights=weights if known else None)
        out, dh, dw = differentiate(
            lambda h, w, options=options: token_losses(h, w, labels, **options), hidden, weight, weights
        )
        assert out.dtype == torch.float32 and dh.dtype == dw.dtype == torch.bfloat16
        assert all(distance(out[row], exact[0][row]) < 1e-2 for row in range(3))
        assert distance(dh, exact[1]) < 1e-2 and distance(dw, exact[2]) < 1e-2


def test_gradients_equal_finite_differences():
    """Without the teacher's half, whose gradient of the KL is cut on purpose."""
    hidden, weight, labels, _ = case(T=3, V=5, M=4)
    dense, masked = hidden.split(2, dim=1)

    def kl(student):
        return token_losses(torch.cat([dense, student], 1), weight, labels, temperature=1.5)[1]

    def ce(x, w):
        return token_losses(torch.cat([x, masked], 1), w, labels)[0]

    assert torch.autograd.gradcheck(kl, (masked.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(ce, (dense.clone().requires_grad_(), weight.clone().requires_grad_()))


def test_the_measured_rows_have_no_gradient_and_the_kl_none_to_the_teacher():
    hidden, weight, labels, _ = case()
    hidden.requires_grad_()
    out = token_losses(hidden, weight, labels)
    assert out.shape == (len(TOKEN_METRICS), 2, 5)
    (measured,) = torch.autograd.grad(out[2:].sum(), hidden, retain_graph=True)
    assert measured.abs().max() == 0
    (kl,) = torch.autograd.grad(out[1].sum(), hidden)
    assert kl[:, :2].abs().max() == 0 and kl[:, 2:].abs().max() > 0


def test_passes_with_equal_logits_agree_on_the_first_of_equal_tokens():
    hidden, weight, labels, _ = case(T=1, B=1)
    weight[7] = weight[3] = 5 * hidden[0, 0].sign()
    hidden[0, 1] = hidden[0, 0]
    assert token_losses(hidden, weight, labels)[3].item() == 1
    hidden[0, 1] = -hidden[0, 0]
    assert token_losses(hidden, weight, labels)[3].item() == 0


def test_one_sweep_when_the_weights_are_known(sweeps):
    """Whatever the common factor, each of Megatron's divisions and a loss scale included."""
    hidden, weight, labels, weights = case()
    for factor in (1.0, 1e-7, -3.0, 2.0**20):
        exact = differentiate(lambda h, w: plain(h, w, labels), hidden, weight, weights, factor)
        sweeps.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            ours = differentiate(
                lambda h, w: token_losses(h, w, labels, loss_weights=weights), hidden, weight, weights, factor
            )
        assert sweeps == [True]
        assert all(distance(a, b) < 1e-12 for a, b in zip(ours, exact, strict=True))


def test_a_loss_of_other_weights_is_differentiated_all_the_same(sweeps):
    hidden, weight, labels, weights = case()
    other = weights.clone()
    other[1, 0, 1] += 0.01
    exact = differentiate(lambda h, w: plain(h, w, labels), hidden, weight, other)
    with pytest.warns(UserWarning, match="does not weigh tokens as loss_weights said"):
        ours = differentiate(
            lambda h, w: token_losses(h, w, labels, loss_weights=weights), hidden, weight, other
        )
    assert sweeps == [True, True]
    assert all(distance(a, b) < 1e-12 for a, b in zip(ours, exact, strict=True))


def test_a_second_backward_is_right_too():
    hidden, weight, labels, weights = case()
    hidden.requires_grad_()
    out = token_losses(hidden, weight, labels, loss_weights=weights)
    loss = (out[:2] * weights).sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(2 * loss, hidden)
    torch.testing.assert_close(second, 2 * first, rtol=1e-12, atol=1e-15)


def test_no_gradients_are_made_for_nobody(sweeps):
    hidden, weight, labels, weights = case()
    with torch.no_grad():
        token_losses(hidden, weight.requires_grad_(), labels, loss_weights=weights)
    token_losses(hidden, weight.detach(), labels, loss_weights=weights)
    assert sweeps == [False, False]


@pytest.mark.parametrize("known", [True, False])
def test_frozen_weight_and_frozen_hidden_states(known):
    hidden, weight, labels, weights = case()
    _, dh, dw = differentiate(lambda h, w: plain(h, w, labels), hidden, weight, weights)
    for h, w, expected in ((hidden.clone().requires_grad_(), weight, dh), (hidden, weight.clone(), dw)):
        leaf = h if h.requires_grad else w.requires_grad_()
        out = token_losses(h, w, labels, loss_weights=weights if known else None)
        (grad,) = torch.autograd.grad((out[:2] * weights).sum(), leaf)
        assert distance(grad, expected) < 1e-12


def test_a_micro_batch_whose_tokens_are_all_hidden():
    hidden, weight, labels, weights = case()
    out, dh, dw = differentiate(
        lambda h, w: token_losses(h, w, labels, loss_weights=0 * weights), hidden, weight, 0 * weights
    )
    assert out.isfinite().all() and (dh == 0).all() and (dw == 0).all()


def test_hidden_states_and_weight_are_left_alone():
    hidden, weight, labels, weights = case()
    before = hidden.clone(), weight.clone()
    hidden.requires_grad_()
    weight.requires_grad_()
    out = token_losses(hidden, weight, labels, temperature=2.0, loss_weights=weights)
    (out[:2] * weights).sum().backward()
    assert torch.equal(hidden, before[0]) and torch.equal(weight, before[1])


class LargestTensor(TorchDispatchMode):
    """Records the largest storage that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("known", [True, False])
def test_logits_of_all_tokens_never_exist(known):
    hidden, weight, labels, weights = case(T=128, V=4000, M=8, dtype=torch.float32)
    options = dict(memory_mib=1, loss_weights=weights if known else None)
    with LargestTensor() as largest:
        differentiate(lambda h, w: token_losses(h, w, labels, **options), hidden, weight, weights)
    assert 0.4 * 2**20 < largest.bytes <= 2**20  # all tokens' are 8 MiB
    with LargestTensor() as largest:
        differentiate(lambda h, w: plain(h, w, labels), hidden, weight, weights)
    assert largest.bytes > 7 * 2**20


@pytest.mark.parametrize("label", [-100, -1, 30, 31])
def test_labels_that_are_no_tokens_are_refused(label):
    hidden, weight, labels, _ = case()
    labels[1, 2] = label
    padded = torch.cat([weight, weight[:4]])  # a row of padding is no token either
    with pytest.raises(ValueError, match=f"labels: {label} is not a token of the vocabulary of 30; hide"):
        token_losses(hidden, padded, labels, vocab_size=30)


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels, weights = case()
    for h, w, y in (
        (hidden[:, :3], weight, labels),
        (hidden, weight[:, :5], labels),
        (hidden, weight, labels.t()),
    ):
        with pytest.raises(ValueError, match="hidden states"):
            token_losses(h, w, y)
    with pytest.raises(ValueError, match="hidden states are torch.float64, the output weight torch.float32"):
        token_losses(hidden, weight.float(), labels)
    with pytest.raises(ValueError, match=r"loss_weights \(1, 2, 5\): give \[2, 2, 5\]"):
        token_losses(hidden, weight, labels, loss_weights=weights[:1])
