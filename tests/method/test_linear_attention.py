"""The chunked linear attention equals the quadratic form, is causal to the bit, and costs O(T) memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcat_nemo.method.linear_attention import chunked_linear_attention, quadratic_linear_attention


def features(B, T, R, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, R, generator=rng, dtype=dtype) for _ in range(3))
    return torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, v


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 70),
    R=st.integers(1, 9),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_equals_the_quadratic_form(B, T, R, chunk, seed):
    q, k, v = features(B, T, R, seed)
    expected = quadratic_linear_attention(q, k, v)
    torch.testing.assert_close(chunked_linear_attention(q, k, v, chunk=chunk), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
def test_equals_the_quadratic_form_at_the_default_chunk(T):
    q, k, v = features(2, T, 16)
    torch.testing.assert_close(
        chunked_linear_attention(q, k, v), quadratic_linear_attention(q, k, v), rtol=0, atol=1e-12
    )


def test_quadratic_form_is_the_recurrence():
    q, k, v = features(1, 9, 3)
    S, z = torch.zeros(3, 3, dtype=q.dtype), torch.zeros(3, dtype=q.dtype)
    for t in range(9):
        S, z = S + torch.outer(k[0, t], v[0, t]), z + k[0, t]
        expected = q[0, t] @ S / (q[0, t] @ z + 1e-6)
        torch.testing.assert_close(quadratic_linear_attention(q, k, v)[0, t], expected, rtol=0, atol=1e-12)


def test_gradients_equal_those_of_the_quadratic_form():
    inputs = features(2, 37, 4)
    weight = torch.randn(2, 37, 4, dtype=torch.float64)
    grads = []
    for form in (lambda *x: chunked_linear_attention(*x, chunk=8), quadratic_linear_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        grads.append(torch.autograd.grad((form(*leaves) * weight).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_equal_finite_differences():
    inputs = [x.requires_grad_() for x in features(1, 7, 2)]
    assert torch.autograd.gradcheck(lambda *x: chunked_linear_attention(*x, chunk=3), inputs)


@pytest.mark.parametrize("chunk", [4, 16, 128])
def test_a_later_token_changes_no_bit_of_an_earlier_output(chunk):
    # Also inside a chunk: a state from which the own chunk is subtracted again would leave rounding behind.
    q, k, v = features(2, 48, 8, dtype=torch.float32)
    before = chunked_linear_attention(q, k, v, chunk=chunk)
    for t in (1, 17, 40, 47):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, t] = x[:, t] * 1e4 + 3
        after = chunked_linear_attention(*changed, chunk=chunk)
        assert torch.equal(after[:, :t], before[:, :t]), t
        assert not torch.equal(after[:, t:], before[:, t:])


def saved_bytes(T):
    """Bytes kept for backward, and the largest single tensor."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        held.append(tensor)  # a freed address must not be counted as the same storage
        return tensor

    held = []
    q, k, v = (x.requires_grad_() for x in features(1, T, 16, dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_linear_attention(q, k, v, chunk=64)
    return sum(sizes.values()), max(sizes.values())


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_memory_is_linear_in_tokens():
    small, large = saved_bytes(2048)[0], saved_bytes(4096)[0]
    assert 1.7 < large / small < 2.3


def test_no_tensor_of_tokens_by_tokens_or_a_state_per_token():
    T, R = 4096, 16
    q, k, v = (x.requires_grad_() for x in features(1, T, R, dtype=torch.float32))
    with LargestTensor() as mode:
        chunked_linear_attention(q, k, v, chunk=64).sum().backward()
    assert T * R <= mode.largest <= T * 64  # the chunks' C×C matrices are the widest: T·C
    with LargestTensor() as mode:  # the measure does see a T×T matrix
        quadratic_linear_attention(q, k, v)
    assert mode.largest == T * T


DOCUMENTS = {
    "one": [0],
    "at chunk bounds": [0, 8, 16],
    "inside chunks": [0, 3, 4, 19, 30],
    "one token each": list(range(37)),
    "began earlier": [5, 21],
}


def positions(starts, tokens=37, batch=2):
    """[batch, tokens]: each token's place in its document; those before the first start belong to an earlier one."""
    place = torch.arange(tokens)
    begins = torch.tensor(starts)
    last = torch.where(begins[None] <= place[:, None], begins[None], -1000).amax(1)
    return (place - last).expand(batch, -1)


class Elsewhere:
    """Segments of a window that is all here: the state before each is the sum, or what a document leaves of it."""

    def __init__(self, lengths, position=None):
        self.lengths, self.position = lengths, position

    def before(self, states):
        out, state, at = [], torch.zeros_like(states[:, 0]), 0
        begun = [] if self.position is None else [p == 0 for p in self.position[0].tolist()]
        for i, length in enumerate(self.lengths):
            out.append(state)
            fresh = any(begun[at : at + length])
            state = states[:, i] + (0 if fresh else state)
            at += length
        return torch.stack(out, 1)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("lengths", [None, (37,), (20, 17), (0, 37), (5, 1, 0, 31)], ids=str)
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_documents_and_segments_against_the_matrix(documents, lengths, chunk):
    q, k, v = features(2, 37, 5)
    position = None if documents == "one" else positions(DOCUMENTS[documents])
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = quadratic_linear_attention(*leaves, position_BT=position)
    grads = torch.autograd.grad((expected * expected.sin()).sum(), leaves)
    segments = None if lengths is None else Elsewhere(lengths, position)
    out = chunked_linear_attention(*leaves, chunk=chunk, segments=segments, position_BT=position)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((out * out.sin()).sum(), leaves)
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_document_is_as_if_alone():
    """Bit for bit where it begins a chunk; no rounding of another document gets in."""
    q, k, v = features(1, 48, 5)
    position = torch.cat([torch.arange(16), torch.arange(32)])[None]
    packed = chunked_linear_attention(q, k, v, chunk=16, position_BT=position)
    alone = chunked_linear_attention(q[:, 16:], k[:, 16:], v[:, 16:], chunk=16)
    assert torch.equal(packed[:, 16:], alone)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (1, 5, 4), (2, 6, 3, 3)], ids=str)
def test_running_sums_without_cumsum(shape):
    """Where PyTorch is told to be deterministic (CUDA's cumsum of floats is not): the same sums, no later term in any."""
    from kvcat_nemo.method.linear_attention import running_sum

    x = torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    expected = running_sum(x)
    torch.testing.assert_close(expected, x.cumsum(1), rtol=0, atol=0)
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradient = torch.autograd.grad((expected * weight).sum(), x)[0]
    torch.use_deterministic_algorithms(True)
    try:
        found = running_sum(x)
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(torch.autograd.grad((found * weight).sum(), x)[0], gradient)
        later = x.detach().clone()
        later[:, -1] += 1e6
        torch.testing.assert_close(running_sum(later)[:, :-1], found[:, :-1].detach(), rtol=0, atol=0)
        assert running_sum(torch.ones(1, 3, dtype=torch.int64)).tolist() == [[1, 2, 3]]
    finally:
        torch.use_deterministic_algorithms(False)
