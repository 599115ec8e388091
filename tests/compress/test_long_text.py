"""Documents longer than the window: chunks, their positions, the past that rolling sees, and runs that were stopped."""

from __future__ import annotations

import pytest
import torch

from kvcat_nemo.compress import Budget, KVCache, Servable, make, next_logits, prefill
from kvcat_nemo.compress.long_text import chunks_of, compress_long, joined, remove_parts
from kvcat_nemo.compress.servable import servable_facts
from tests.support.hf_models import small_model, tokens

FORM = Servable(block=4)


@torch.no_grad()
def log_probs(model, cache, ids):
    return next_logits(model, cache, torch.tensor([ids])).double().log_softmax(-1)


@pytest.mark.parametrize("length", [1000, 1001, 3000, 100])
@pytest.mark.parametrize("budget", [Budget(keep_fraction=0.05), Budget(tokens=80)])
def test_chunks_cover_the_text_and_their_slots_follow_each_other(length, budget):
    chunks = chunks_of(length, budget, FORM, 512)
    assert [c.first for c in chunks] == [0, *(c.last for c in chunks[:-1])] and chunks[-1].last == length
    assert max(c.last - c.first for c in chunks) <= 256
    before = 0
    for c in chunks:
        assert c.before == before and c.slots % 4 == 0 and 0 < c.slots <= c.last - c.first
        before += c.slots
    asked = budget.slots(length)
    assert asked <= before < asked + 4


def test_small_shares_add_up_to_the_budget_or_are_refused():
    """Rounded up one by one, 5 % of 50,000 tokens in chunks of 128 were two and a half times as many slots."""
    form = Servable(block=16)
    with pytest.raises(ValueError, match="less than a block of 16; keep more"):
        chunks_of(50_000, Budget(keep_fraction=0.05), form, 8192, 128)
    chunks = chunks_of(50_000, Budget(keep_fraction=0.05), form, 8192, 1024)
    assert sum(c.slots for c in chunks) == 2512
    with pytest.raises(ValueError, match="chunks of 8 tokens"):
        chunks_of(17, Budget(tokens=16), form, 8192, 16)


@pytest.mark.parametrize("mode", ["fold", "rolling"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_one_chunk_is_the_servable_cache_of_the_text(mode, kind):
    from kvcat_nemo.compress import compress_servable

    model, ids, after = small_model(kind), tokens(90), tokens(8, 1)
    spec = "attention-matching:queries=context"
    long = compress_long(model, ids, make(spec), Budget(tokens=24), FORM, mode=mode)
    short = compress_servable(model, ids, make(spec), Budget(tokens=24), FORM).cache
    torch.testing.assert_close(
        log_probs(model, long, after), log_probs(model, short, after), rtol=0, atol=1e-5
    )
    assert servable_facts(long, "x")["text_tokens"] == 90


def test_rolling_with_all_slots_is_one_reading():
    """No slot dropped: chunks behind each other are the whole text's cache, to rounding."""
    model, ids, after = small_model(dtype=torch.float64), tokens(96), tokens(8, 1)
    cache = compress_long(model, ids, make("recent"), Budget(keep_fraction=1), FORM, mode="rolling", chunk=32)
    full = prefill(model, [ids]).cache
    torch.testing.assert_close(
        log_probs(model, cache, after), log_probs(model, full, after), rtol=0, atol=1e-4
    )
    # Read alone, later chunks see nothing of the earlier ones: another cache.
    alone = compress_long(model, ids, make("recent"), Budget(keep_fraction=1), FORM, mode="fold", chunk=32)
    assert (log_probs(model, alone, after) - log_probs(model, full, after)).abs().max() > 1e-2


@pytest.mark.parametrize("mode", ["fold", "rolling"])
def test_a_text_of_four_windows(mode):
    model, ids, after = small_model(), tokens(2000), tokens(8, 1)
    cache = compress_long(model, ids, make("attention-matching"), Budget(keep_fraction=0.05), FORM, mode=mode)
    assert int(cache.lengths_B[0]) == cache.slots < 512
    assert cache.facts["chunks"] == {"mode": mode, "count": 8, "tokens": 250}
    assert servable_facts(cache, "x")["text_tokens"] == 2000
    assert log_probs(model, cache, after).isfinite().all()


@pytest.mark.parametrize("mode", ["fold", "rolling"])
def test_a_run_that_was_stopped_goes_on(mode, tmp_path):
    model, ids, parts = small_model(), tokens(600), tmp_path / "x.parts"
    arguments = (model, ids, make("recent"), Budget(tokens=48), FORM)
    whole = compress_long(*arguments, mode=mode, chunk=100)

    def stopped(chunks):
        yield from chunks[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_long(*arguments, mode=mode, chunk=100, parts=parts, progress=stopped)
    assert len(list(parts.iterdir())) == 4
    passes = []
    hook = model.model.register_forward_pre_hook(lambda *a: passes.append(1))
    again = compress_long(*arguments, mode=mode, chunk=100, parts=parts)
    hook.remove()
    assert len(passes) == 2
    (parts / "notes.txt").write_text("mine")
    remove_parts(parts)
    assert [x.name for x in parts.iterdir()] == ["notes.txt"]
    (parts / "notes.txt").unlink()
    remove_parts(parts)
    assert not parts.exists()
    for a, b in zip(again.layers, whole.layers, strict=True):
        torch.testing.assert_close(a.keys_BGSD, b.keys_BGSD, rtol=0, atol=0)
    # Another text or another budget takes none of the chunks.
    with pytest.raises(KeyboardInterrupt):
        compress_long(*arguments, mode=mode, chunk=100, parts=parts, progress=stopped)
    passes = []
    hook = model.model.register_forward_pre_hook(lambda *a: passes.append(1))
    compress_long(model, tokens(600, 9), *arguments[2:], mode=mode, chunk=100, parts=parts)
    hook.remove()
    assert len(passes) == 6
    # A damaged chunk is read again.
    damaged = sorted(parts.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    compress_long(model, tokens(600, 9), *arguments[2:], mode=mode, chunk=100, parts=parts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "other"}, "mode='other'"),
        ({"chunk": 3}, "chunk=3: give at least a block, 4"),
        ({"chunk": 513}, "chunk=513"),
        ({"budget": Budget(keep_fraction=0.5)}, "the model reads 512; keep fewer slots"),
        ({"mode": "rolling", "compressor": "kvsculpt"}, "reads the context again"),
        ({"compressor": "attention-matching+int4"}, "4-bit codes"),
    ],
)
def test_what_is_refused_before_any_work(change, words):
    model = small_model()
    model.model.register_forward_pre_hook(lambda *a: pytest.fail("the model was run"))
    given = {"compressor": "recent", "budget": Budget(tokens=40), **change}
    maker, budget = make(given.pop("compressor")), given.pop("budget")
    with pytest.raises(ValueError, match=words):
        compress_long(model, tokens(1500), maker, budget, FORM, **given)


def test_joined_slots_stand_behind_each_other():
    model = small_model()
    parts = [prefill(model, [tokens(5, n)]).cache for n in range(2)]
    cache = joined(parts)
    assert isinstance(cache, KVCache) and cache.slots == 10
    torch.testing.assert_close(cache.layers[0].keys_BGSD[:, :, 5:], parts[1].layers[0].keys_BGSD)
