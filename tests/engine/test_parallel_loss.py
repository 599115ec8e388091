"""The fused losses of one process against the method's own, in float64. (Split vocabularies: test_layouts.)"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcat_nemo.engine.parallel_loss import TOKEN_METRICS, token_losses
from kvcat_nemo.method.losses import kl_teacher_student, next_token_ce


def case(T, B, V, paired=True, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(T, 2 * B if paired else B, V, generator=rng, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, V, (B, T), generator=rng)


def plain(logits_TBV, labels_BT, temperature, paired=True):
    """[4, B, T] of the method's functions."""
    x = logits_TBV.transpose(0, 1)
    if not paired:
        return next_token_ce(x, labels_BT)[None]
    dense, masked = x.chunk(2)
    agree = (dense.argmax(-1) == masked.argmax(-1)).to(x.dtype)
    kl = kl_teacher_student(dense, masked, temperature)
    return torch.stack(
        [next_token_ce(dense, labels_BT), kl, next_token_ce(masked, labels_BT).detach(), agree]
    )


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 11),
    B=st.integers(1, 3),
    V=st.integers(2, 9),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 13),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 4.0]),
    paired=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values_and_gradients(T, B, V, padding, chunk, temperature, paired, seed):
    logits, labels = case(T, B, V, paired, seed)
    # Padding columns hold the largest logits of all: whatever leaks is seen.
    padded = torch.cat([logits, torch.full((*logits.shape[:2], padding), 60.0, dtype=logits.dtype)], -1)
    fused = dict(vocab_size=V, paired=paired, temperature=temperature, chunk=chunk)
    results = []
    for x, losses in (
        (padded, lambda x: token_losses(x, labels, **fused)),
        (logits, lambda x: plain(x, labels, temperature, paired)),
    ):
        leaf = x.clone().requires_grad_()
        out = losses(leaf)
        weight = torch.randn(out[:2].shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
        results.append((out, torch.autograd.grad((out[:2] * weight).sum(), leaf)[0]))
    (out, grad), (expected, expected_grad) = results
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad[..., :V], expected_grad, rtol=1e-10, atol=1e-10)
    assert (grad[..., V:] == 0).all()


def test_gradients_equal_finite_differences():
    """Without the teacher's half, whose gradient of the KL is cut on purpose."""
    logits, labels = case(3, 2, 5)
    dense, masked = logits.split(2, dim=1)

    def kl(student):
        return token_losses(torch.cat([dense, student], 1), labels, vocab_size=5, temperature=1.5)[1]

    def ce(x):
        return token_losses(torch.cat([x, masked], 1), labels, vocab_size=5)[0]

    assert torch.autograd.gradcheck(kl, (masked.clone().requires_grad_(),))
    assert torch.autograd.gradcheck(ce, (dense.clone().requires_grad_(),))


def test_the_measured_rows_have_no_gradient_and_the_kl_none_to_the_teacher():
    logits, labels = case(4, 2, 6)
    logits.requires_grad_()
    out = token_losses(logits, labels, vocab_size=6)
    assert out.shape == (len(TOKEN_METRICS), 2, 4)
    (measured,) = torch.autograd.grad(out[2:].sum(), logits, retain_graph=True)
    assert measured.abs().max() == 0
    (kl,) = torch.autograd.grad(out[1].sum(), logits)
    assert kl[:, :2].abs().max() == 0 and kl[:, 2:].abs().max() > 0


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_bfloat16_logits_are_computed_in_float32(chunk):
    logits, labels = case(7, 2, 50, dtype=torch.bfloat16)
    logits.requires_grad_()
    out = token_losses(logits, labels, vocab_size=47, chunk=chunk)
    assert out.dtype == torch.float32
    wide = logits.detach().double()[..., :47].requires_grad_()
    labels = labels.clamp(max=46)
    out = token_losses(logits, labels, vocab_size=47, chunk=chunk)
    expected = plain(wide, labels, 1.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(out[:2].sum(), logits)
    (other,) = torch.autograd.grad(expected[:2].sum(), wide)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad[..., :47].double(), other, rtol=1e-2, atol=1e-2)


def test_logits_are_left_alone():
    """The output layer's result is saved for backward; a loss that writes into it would corrupt the gradient."""
    logits, labels = case(4, 2, 6)
    before = logits.clone()
    token_losses(logits.requires_grad_(), labels, vocab_size=5, temperature=2.0)[:2].sum().backward()
    assert torch.equal(logits, before)
