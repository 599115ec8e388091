"""No entry reads more than the model does, and every one says so before any work."""

from __future__ import annotations

import pytest
import torch

from kvcat_nemo.compress import Budget, compress, extend, generate, make, next_logits, prefill
from kvcat_nemo.compress.context_limit import check_positions, position_limit
from kvcat_nemo.compress.gradient import sample, teach
from tests.support.hf_models import small_model, tokens

LIMIT = 40


@pytest.fixture(scope="module")
def model():
    return small_model(max_position_embeddings=LIMIT)


@pytest.fixture(scope="module")
def full(model):
    return prefill(model, [tokens(30)])


def ids(count, rows=1):
    return torch.tensor([tokens(count)] * rows)


ENTRIES = {
    "prefill": lambda m, full, n: prefill(m, [tokens(30 + n)]),
    "prefill rows": lambda m, full, n: prefill(m, [tokens(3), tokens(30 + n)]),
    "compress": lambda m, full, n: compress(m, [tokens(30 + n)], make("random"), Budget(tokens=5)),
    "extend": lambda m, full, n: extend(m, full.cache, ids(n)),
    "extend twice": lambda m, full, n: extend(m, extend(m, full.cache, ids(4))[1], ids(n - 4)),
    "next_logits": lambda m, full, n: next_logits(m, full.cache, ids(n)),
    "generate": lambda m, full, n: generate(m, full.cache, tokens(2), max_new_tokens=n - 2),
    "generate, prompt": lambda m, full, n: generate(m, full.cache, tokens(n - 1), max_new_tokens=1),
    "teach": lambda m, full, n: teach(m, full.cache, ids(n)[None]),
    "sample": lambda m, full, n: sample(full, 2, n, seed=0),
    "gradient": lambda m, full, n: make(f"gradient:tokens={n}:steps=1:init=random").compress(
        full, Budget(tokens=5)
    ),
    "gradient+int8": lambda m, full, n: make(f"gradient:tokens={n}:steps=1:init=random+int8").compress(
        full, Budget(tokens=5)
    ),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_ends_where_the_model_does(entry, model, full, monkeypatch):
    run = ENTRIES[entry]
    run(model, full, 10)
    import kvcat_nemo.compress.hf_attention as hf_attention

    passes = []
    monkeypatch.setattr(
        hf_attention, "attention", lambda m, name: passes.append(m) or pytest.fail("a pass was begun")
    )
    if entry == "extend twice":
        monkeypatch.undo()
    with pytest.raises(
        ValueError, match=rf"41 tokens.*: the model reads {LIMIT} \(max_position_embeddings\); "
    ):
        run(model, full, 11)
    assert not passes


def test_rows_are_checked_one_by_one(model):
    cache = prefill(model, [tokens(30), tokens(12)]).cache
    lengths = torch.tensor([10, 12])
    logits, _ = extend(model, cache, ids(12, 2), lengths_B=lengths)  # row 0 ends at 40, its padding beyond
    assert logits.shape[1] == 12
    with pytest.raises(ValueError, match=r"row 0: the model reads 40"):
        extend(model, cache, ids(12, 2), lengths_B=torch.tensor([11, 12]))
    for wrong in ([10], [13, 12], [-1, 3]):
        with pytest.raises(ValueError, match="give one for each of 2 rows, from 0 to 12"):
            extend(model, cache, ids(12, 2), lengths_B=torch.tensor(wrong))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: give a whole number of at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens=-3"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"prompt": []}, "give at least one token"),
        ({"prompt": [97]}, r"prompt\[0\] = 97: must be a token id, a whole number from 0 to 96"),
        ({"prompt": [3, -1]}, r"prompt\[1\] = -1"),
        ({"prompt": [1.5]}, r"prompt\[0\] = 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message, model, full):
    settings = {"prompt": tokens(2), "max_new_tokens": 2, **settings}
    with pytest.raises(ValueError, match=message):
        generate(model, full.cache, settings.pop("prompt"), **settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "at least one"),
        (torch.zeros(3, dtype=torch.long), r"\[rows, tokens\]"),
        (torch.zeros(1, 2), "give whole numbers"),
        (torch.tensor([[97]]), "ids from 97 to 97: the model's vocabulary has token ids from 0 to 96"),
        (torch.tensor([[-2, 4]]), "ids from -2 to 4"),
        (torch.zeros(2, 3, dtype=torch.long), "cache of 1 rows, but 2 rows of tokens"),
    ],
)
def test_tokens_that_do_not_go_with_cache_and_model_are_refused(given, message, model, full):
    for entry in (extend, next_logits):
        with pytest.raises(ValueError, match=message):
            entry(model, full.cache, given)


def test_contexts_hold_token_ids(model):
    for row, message in (
        ([3, 97], r"context\[1\] = 97"),
        ([None], r"context\[0\] = None"),
        ([], "empty document"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill(model, [row])


FILE = {"model_type": "llama", "max_position_embeddings": 100}


@pytest.mark.parametrize(
    ("config", "length", "limit"),
    [
        (FILE, 0, 100),
        ({"model_type": "llama"}, 0, 2048),  # what transformers takes for a config without the field
        ({**FILE, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 50, 100),
        ({**FILE, "rope_scaling": {"type": "linear", "factor": 4.0}}, 50, 100),
    ],
)
def test_the_limit_of_a_configuration(config, length, limit):
    assert position_limit(config) == limit
    check_positions(config, [length], limit - length, what="text", fix="cut it")
    with pytest.raises(ValueError, match=rf"text of {limit + 1} tokens .*reads {limit} \(.*\); cut it"):
        check_positions(config, [length], limit - length + 1, what="text", fix="cut it")


@pytest.mark.parametrize("value", ["100", 0, -5, 1e3, True, float("nan")])
def test_a_limit_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="max_position_embeddings = .*: must be a whole number above 0"):
        position_limit({**FILE, "max_position_embeddings": value})
