"""Training a cache: the loss falls to what can be reached, rows are independent, the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from kvcat_nemo.compress import Budget, make, next_logits, prefill, stack_rows
from kvcat_nemo.compress.gradient import Step, optimise, sample, teach
from tests.support.hf_models import small_model, tokens


def kl(model, full, cache, ids):
    """KL(full ‖ cache) per token, the readable way."""
    with torch.no_grad():
        p, q = (next_logits(model, c, ids).double().log_softmax(-1) for c in (full, cache))
    return float((p.exp() * (p - q)).sum(-1).mean())


def start(kind="llama", dtype=torch.float32, slots=6, seed=0):
    model = small_model(kind, dtype=dtype)
    prefilled = prefill(model, [tokens(40, seed)])
    cache = make("random").compress(prefilled, Budget(tokens=slots))
    return model, prefilled, cache, torch.tensor([[tokens(12, 50), tokens(12, 51)]])


@pytest.mark.parametrize("kind, dtype", [("llama", torch.float32), ("qwen3", torch.bfloat16)])
def test_the_trained_cache_says_what_the_full_one_says(kind, dtype):
    model, prefilled, cache, ids = start(kind, dtype)
    before = [p.clone() for p in model.parameters()]
    told: list[Step] = []
    lessons = teach(model, prefilled.cache, ids)
    first = kl(model, prefilled.cache, cache, ids[:, 0])
    got = optimise(model, cache, lessons, steps=40, lr=0.05, batch=2, on_step=told.append)
    after = [kl(model, prefilled.cache, got, ids[:, k]) for k in range(2)]
    assert max(after) < first / 5
    assert [step.number for step in told] == list(range(1, 41))
    # The loss told is that of the cache before the step; the cache told is that after it.
    assert told[0].losses_B[0] == pytest.approx(
        (first + kl(model, prefilled.cache, cache, ids[:, 1])) / 2,
        rel=1e-3 if dtype == torch.float32 else 0.1,
    )
    assert told[7].losses_B[0] == pytest.approx(
        sum(kl(model, prefilled.cache, told[6].cache, ids[:, k]) for k in range(2)) / 2, rel=0.1
    )
    assert torch.equal(told[-1].cache.layers[0].keys_BGSD, got.layers[0].keys_BGSD)
    assert got.layers[0].keys_BGSD.dtype == dtype and got.slots == 6
    assert got.layers[0].has_bias and got.lengths_B.tolist() == [40]
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) and p.grad is None and p.requires_grad
    again = optimise(model, cache, lessons, steps=5, lr=0.05, batch=2)
    assert torch.equal(again.layers[2].values_BGSE, told[4].cache.layers[2].values_BGSE)  # deterministic


def test_first_step_is_adam_on_the_exact_gradient():
    """Against a plain float64 form: the sign of the gradient times the rate, in units of the layer's size."""
    model, prefilled, cache, ids = start(dtype=torch.float64)
    lessons = teach(model, prefilled.cache, ids)
    got = optimise(model, cache, lessons, steps=1, lr=1e-3)
    for number in (0, 2):
        keys = cache.layers[number].keys_BGSD.clone().requires_grad_(True)
        part = stack_rows([cache.row(0)])
        part.layers = [*part.layers]
        part.layers[number] = type(part.layers[number])(
            keys, part.layers[number].values_BGSE, part.layers[number].bias_BGS
        )
        student = next_logits(model, part, ids[:, 0]).log_softmax(-1)
        F.kl_div(
            student, lessons.logits_BKNV[:, 0].log_softmax(-1), log_target=True, reduction="sum"
        ).backward()
        unit = cache.layers[number].keys_BGSD.square().mean().sqrt()
        g = keys.grad * unit / 12  # per token, in the parameter's units; Adam's ε is 1e-8
        expected = keys.detach() - 1e-3 * unit * g / (g.abs() + 1e-8)
        torch.testing.assert_close(got.layers[number].keys_BGSD, expected, rtol=0, atol=1e-8)


def test_rows_do_not_see_each_other_and_padding_stays_padding():
    model = small_model()
    rows = [tokens(30, 1), tokens(12, 2)]
    prefilled = prefill(model, rows)
    cache = make("random").compress(prefilled, Budget(keep_fraction=0.3))
    ids = torch.tensor([[tokens(8, 5)], [tokens(8, 6)]])
    both = optimise(model, cache, teach(model, prefilled.cache, ids), steps=5, lr=0.05)
    assert both.layers[0].slots_BG.tolist() == [[9, 9], [3, 3]]
    for b in range(2):
        alone = prefilled.row(b)
        one = optimise(model, cache.row(b), teach(model, alone.cache, ids[b : b + 1]), steps=5, lr=0.05)
        torch.testing.assert_close(
            both.row(b).layers[1].keys_BGSD, one.layers[1].keys_BGSD, rtol=1e-2, atol=1e-2
        )
        assert both.row(b).layers[1].keys_BGSD.shape == one.layers[1].keys_BGSD.shape


def test_ce_learns_the_lessons_own_tokens_and_bias_may_stay():
    model, prefilled, cache, ids = start()
    lessons = teach(model, prefilled.cache, ids)
    losses = []
    got = optimise(
        model, cache, lessons, steps=30, lr=0.05, loss="ce", train_bias=False,
        on_step=lambda step: losses.append(step.losses_B[0]),
    )  # fmt: skip
    assert losses[0] == pytest.approx(
        F.cross_entropy(next_logits(model, cache, ids[:, 0])[0, :-1], ids[0, 0, 1:]).item(), rel=1e-4
    )
    assert losses[28] < losses[0] - 0.5
    assert not got.layers[0].has_bias


@pytest.mark.parametrize("text", ["repeat", "sample"])
def test_compressor_beats_the_slots_it_started_from(text):
    model = small_model(dtype=torch.float64)
    rows = [tokens(40, 3), tokens(25, 4)]
    prefilled = prefill(model, rows)
    budget = Budget(keep_fraction=0.2)
    maker = make(f"gradient:init=recent:steps=40:lr=0.05:text={text}:tokens=20:lessons=2")
    got, plain = maker.compress(prefilled, budget), make("recent").compress(prefilled, budget)
    assert got.layers[0].slots_BG.tolist() == [[8, 8], [5, 5]]
    ids = torch.tensor([tokens(16, 60)] * 2)  # unseen text
    assert kl(model, prefilled.cache, got, ids) < kl(model, prefilled.cache, plain, ids)
    assert got.facts["compressor"] == str(maker)


def test_samples_are_the_models_own_and_follow_the_seed():
    model = small_model(dtype=torch.float64)
    prefilled = prefill(model, [tokens(20)])
    one, again, other = (sample(prefilled, 3, 10, seed=seed) for seed in (0, 0, 1))
    assert one.shape == (1, 3, 10) and torch.equal(one, again) and not torch.equal(one, other)
    # Likelier under the model than even draws: mean log-probability above −log V.
    logits = next_logits(model, prefilled.cache, one[:, 0]).log_softmax(-1)
    assert logits[0, :-1].gather(-1, one[0, 0, 1:, None]).mean().item() > -torch.log(torch.tensor(97.0))


def test_refusals():
    model, prefilled, cache, ids = start()
    lessons = teach(model, prefilled.cache, ids)
    with pytest.raises(ValueError, match=r"ids \(1, 12\): give \[rows, texts, tokens\], 1 rows"):
        teach(model, prefilled.cache, ids[0, :1])
    with pytest.raises(ValueError, match="lessons for 1 rows, but the cache has 2"):
        optimise(model, stack_rows([cache, cache]), lessons, steps=1, lr=0.1)
    with pytest.raises(ValueError, match="steps=0"):
        optimise(model, cache, lessons, steps=0, lr=0.1)
    with pytest.raises(ValueError, match="batch=3: there are 2 lessons"):
        optimise(model, cache, lessons, steps=1, lr=0.1, batch=3)
    with pytest.raises(ValueError, match="loss='mse'"):
        optimise(model, cache, lessons, steps=1, lr=0.1, loss="mse")
    with pytest.raises(ValueError, match="text='other'"):
        make("gradient:text=other")
    with pytest.raises(ValueError, match="init='gradient'"):
        make("gradient:init=gradient")
    with pytest.raises(ValueError, match="choose among"):
        make("gradient:init=nonsense")
