"""A model stops at any of its end tokens, wherever its files name them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.compress import generate, prefill
from kvcat_nemo.evaluate.models import load_model
from kvcat_nemo.tokens import end_ids, following_ids, load
from tests.tokens.small_tokenizers import BY_NAME, CASES, save_model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_end_tokens_of_a_folder(case, folders):
    folder = folders(case.name)
    model, tokenizer, _ = load_model(folder, device="cpu")
    assert end_ids(tokenizer, model) == case.ends
    files = {name: folder / f"{name}.json" for name in ("config", "generation_config")}
    read = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    assert end_ids(load(folder), **read) == case.ends


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [
        (None, None, (7,)),
        ({"eos_token_id": 9}, None, (7, 9)),
        ({"eos_token_id": [9, 7]}, {"eos_token_id": [3, 128009]}, (3, 7, 9, 128009)),
        ({"eos_token_id": None}, {"eos_token_id": 3}, (3, 7)),
        (SimpleNamespace(eos_token_id=torch.tensor([4, 5])), {}, (4, 5, 7)),
    ],
)
def test_end_tokens_of_all_places_count(config, generation, found):
    tokenizer = SimpleNamespace(eos_token_id=7)
    assert end_ids(tokenizer, config=config, generation_config=generation) == found
    assert end_ids(None, config=config, generation_config=generation) == tuple(
        x for x in found if x != 7 or "7" in str(config)
    )


@pytest.mark.parametrize("value", ["2", -1, True, [1, None], 2.0])
def test_what_is_no_token_id_is_refused(value):
    with pytest.raises(ValueError, match="generation_config: eos_token_id = .* must be a token id or a list"):
        end_ids(None, generation_config={"eos_token_id": value})


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """A model, what it says greedily after a context, and the same folder with the third of those tokens as an end."""
    folder = save_model(BY_NAME["plain"], tmp_path_factory.mktemp("stopping") / "model", seed=3)
    model, tokenizer, _ = load_model(folder, device="cpu")
    context, prompt = following_ids(tokenizer, "the cache of text"), following_ids(tokenizer, " and so on")
    said = generate(model, prefill(model, [context]).cache, prompt, max_new_tokens=12)
    end = next(x for i, x in enumerate(said) if i >= 2 and x not in said[:i] and x > 3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    return folder, said, said[: said.index(end)]


def test_generate_stops_at_the_second_end_token(stopping, tmp_path, monkeypatch):
    folder, said, wanted = stopping
    (tmp_path / "t.txt").write_text("the cache of text")
    seen = []
    import kvcat_nemo.compress as module

    monkeypatch.setattr(module, "generate", lambda *a, **o: seen.append(generate(*a, **o)) or seen[-1])

    def kvcat(*words):
        done = CliRunner().invoke(main, [str(word) for word in words])
        assert done.exit_code == 0, done.output

    kvcat("compress", folder, "--text", tmp_path / "t.txt", "--keep", 1, "--out", tmp_path / "c.safetensors")
    kvcat(
        *("generate", folder, "--cache", tmp_path / "c.safetensors", "--prompt", " and so on", "--tokens", 12)
    )
    assert seen == [wanted] and len(wanted) < len(said)


def test_evaluations_stop_at_the_second_end_token(stopping):
    from kvcat_nemo.evaluate.long_qa import LongQA
    from kvcat_nemo.evaluate.question_protocol import Ask
    from kvcat_nemo.evaluate.ruler import Ruler

    folder, _, wanted = stopping
    model, tokenizer, _ = load_model(folder, device="cpu")
    cache = prefill(model, [following_ids(tokenizer, "the cache of text")]).cache
    prompt = following_ids(tokenizer, " and so on")
    ask = Ask("q", prompt, {"answers": ["x"], "answer_tokens": 12, "first": [5]})
    said = tokenizer.decode(wanted)
    assert Ruler(models=["m"], out="o").measure(model, tokenizer, cache, ask)["said"] == said
    squad = LongQA(models=["m"], out="o", questions="squad", file="f")
    assert squad.measure(model, tokenizer, cache, ask)["said"] == said.strip().partition("\n")[0]
