"""Compressed documents in transformers' own generate, in the version that is installed, with stock attention."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextIteratorStreamer

from kvcat_nemo.compress import Budget, KVCache, Servable, compress_servable, generate, make, next_logits
from kvcat_nemo.compress.storage import save
from kvcat_nemo.serve import fork, inputs_for, load_cache, read_document
from kvcat_nemo.tokens import chat_form, document_ids, following_ids, load

TEXT = "the cache of text number 7 grows with every token of it: 259, and so on. " * 5
PROMPT = "grows with"
NEW = 12


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load(folder)


def model_of(folder, attention="sdpa", dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model


@pytest.fixture(scope="module")
def files(folder, tokenizer, tmp_path_factory):
    """The document in a template and without one, in float32 and bfloat16."""
    place, model = tmp_path_factory.mktemp("caches"), model_of(folder)
    form = chat_form(tokenizer, "default")
    for name, chat in (("plain", None), ("chat", form)):
        for dtype in ("float32", "bfloat16"):
            ids = chat.document_ids(tokenizer, TEXT) if chat else document_ids(tokenizer, TEXT)
            done = compress_servable(
                model, ids, make("attention-matching"), Budget(keep_fraction=0.3), Servable(dtype=dtype)
            )
            done.cache.facts["ids"] = {"chat_template": chat.facts() if chat else None}
            save(done.cache, place / f"{name}-{dtype}.kv")
    return place


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_is_what_our_own_generate_says(folder, tokenizer, files, attention):
    model = model_of(folder, attention)
    cache = load_cache(files / "plain-float32.kv", model)
    assert type(cache) is DynamicCache
    inputs = inputs_for(cache, tokenizer, PROMPT)
    C, N = len(cache.kvcat_placeholders), inputs["input_ids"].shape[1]
    ours = KVCache.load(files / "plain-float32.kv")
    prompt = following_ids(tokenizer, PROMPT)
    assert inputs["input_ids"][0, C:].tolist() == prompt
    out = model.generate(
        **inputs,
        past_key_values=fork(cache),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = generate(model, ours, prompt, max_new_tokens=NEW)
    assert out.sequences[0, N:].tolist() == expected
    with torch.no_grad():
        logits = next_logits(model, ours, torch.tensor([prompt + expected[:-1]]))[0, len(prompt) - 1 :]
    torch.testing.assert_close(torch.cat(out.logits), logits, rtol=0, atol=2e-4 * float(logits.abs().max()))
    assert cache.get_seq_length() == C  # a fork grows, the document stays


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_of_unequal_prompts_are_as_alone(folder, tokenizer, files, attention):
    model = model_of(folder, attention)
    prompts = ["grows", "the cache of text number 12", "and so on. 12"]
    alone = []
    for prompt in prompts:
        cache = load_cache(files / "plain-float32.kv", model)
        inputs = inputs_for(cache, tokenizer, prompt)
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        alone.append(out[0, inputs["input_ids"].shape[1] :].tolist())
    cache = load_cache(files / "plain-float32.kv", model, rows=3)
    inputs = inputs_for(cache, tokenizer, prompts)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == alone
    assert len({tuple(x) for x in alone}) == 3


def test_beams_and_samples(folder, tokenizer, files):
    model = model_of(folder)
    cache = load_cache(files / "plain-float32.kv", model, rows=3)
    inputs = inputs_for(load_cache(files / "plain-float32.kv", model), tokenizer, PROMPT)
    N = inputs["input_ids"].shape[1]
    beams = model.generate(
        **inputs,
        past_key_values=fork(cache),
        max_new_tokens=6,
        num_beams=3,
        do_sample=False,
        num_return_sequences=1,
    )
    ours, prompt = KVCache.load(files / "plain-float32.kv"), following_ids(tokenizer, PROMPT)

    def score(new):
        with torch.no_grad():
            logits = next_logits(model, ours, torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum())

    # The oracle: a beam search of our own over our own decoding.
    kept = [([], 0.0)]
    for _ in range(6):
        grown = []
        for new, _ in kept:
            with torch.no_grad():
                last = next_logits(model, ours, torch.tensor([prompt + new]))[0, -1].log_softmax(-1)
            for token in last.topk(6).indices.tolist():
                grown.append((new + [token], score(new + [token])))
        kept = sorted(grown, key=lambda x: -x[1])[:3]
    assert beams[0, N:].tolist() == kept[0][0]
    torch.manual_seed(3)
    drawn = model.generate(
        **inputs, past_key_values=fork(cache), max_new_tokens=NEW, do_sample=True, num_return_sequences=3
    )
    assert drawn.shape == (3, N + NEW) and len({tuple(x) for x in drawn.tolist()}) > 1


def test_streaming(folder, tokenizer, files):
    model = model_of(folder)
    cache = load_cache(files / "plain-float32.kv", model)
    inputs = inputs_for(cache, tokenizer, PROMPT)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": NEW, "do_sample": False}
    whole = model.generate(**inputs, past_key_values=fork(cache), **options)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, "past_key_values": cache, "streamer": streamer, **options}
    )
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :])


def test_turns_grow_and_fork(folder, tokenizer, files):
    model = model_of(folder)
    cache = load_cache(files / "chat-float32.kv", model)
    document, ours = read_document(files / "chat-float32.kv")
    inputs = inputs_for(cache, tokenizer, "What grows?")
    first = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
    C = document.slots
    answers = {}
    for question in ("And then?", "Number?"):
        branch = fork(cache)
        inputs = inputs_for(branch, tokenizer, question, so_far=first)
        out = model.generate(**inputs, past_key_values=branch, max_new_tokens=5, do_sample=False)
        answers[question] = out[0, inputs["input_ids"].shape[1] :].tolist()
        fed = inputs["input_ids"][0, C:].tolist()
        assert answers[question] == generate(model, ours, fed, max_new_tokens=5)
        tail = tokenizer.decode(fed)
        assert tail.endswith(f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    assert cache.get_seq_length() == first.shape[1] - 1  # the trunk stays, the branches have grown


def test_a_conversation_is_what_the_template_makes_of_it(folder, tokenizer, files):
    model = model_of(folder)
    cache = load_cache(files / "chat-float32.kv", model)
    messages = [
        {"role": "user", "content": " What grows?"},
        {"role": "assistant", "content": "the cache"},
        {"role": "user", "content": "and <|im_end|> then"},
    ]
    whole = [{"role": "user", "content": TEXT + " What grows?"}, *messages[1:]]
    inputs = inputs_for(cache, tokenizer, messages=messages)
    got = inputs["input_ids"][0, len(cache.kvcat_placeholders) :].tolist()
    document = chat_form(tokenizer, "default").document_ids(tokenizer, TEXT)
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        whole, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(document + got) == text
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert got.count(end) == 3  # the one that a message mentions is text


def test_bfloat16(folder, tokenizer, files):
    model = model_of(folder, dtype=torch.bfloat16)
    cache = load_cache(files / "plain-bfloat16.kv", model)
    inputs = inputs_for(cache, tokenizer, PROMPT)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    expected = generate(
        model,
        KVCache.load(files / "plain-bfloat16.kv"),
        following_ids(tokenizer, PROMPT),
        max_new_tokens=NEW,
    )
    # Roundings of two attention kernels: the first tokens agree, a tie may part the rest.
    assert out[0, inputs["input_ids"].shape[1] :].tolist()[:3] == expected[:3]


def test_placeholders_are_the_files_own(files):
    documents = [read_document(path)[0] for path in sorted(files.glob("*.kv"))]
    ids = [tuple(d.placeholder_ids(380)) for d in documents]
    assert len(documents) == 4 and len({x[:8] for x in ids}) == 4
    assert all(len(x) == d.slots and 0 <= min(x) <= max(x) < 380 for x, d in zip(ids, documents, strict=True))
    assert ids[0] == tuple(read_document(sorted(files.glob("*.kv"))[0])[0].placeholder_ids(380))


def test_what_is_refused(folder, tokenizer, files, tmp_path):
    model = model_of(folder)
    with pytest.raises(
        ValueError, match=r"plain-bfloat16.kv: keys and values of bfloat16, the model computes in float32"
    ):
        load_cache(files / "plain-bfloat16.kv", model)
    with torch.no_grad():
        other = model_of(folder)
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(
        ValueError, match=r"plain-float32.kv: cache: it was made by a model with other weights"
    ):
        load_cache(files / "plain-float32.kv", other)
    data = (files / "plain-float32.kv").read_bytes()
    (tmp_path / "cut.kv").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut.kv: cut off"):
        load_cache(tmp_path / "cut.kv", model)
    with pytest.raises(ValueError, match=r"plain-float32.kv: the file was exchanged"):
        read_document(files / "plain-float32.kv", sha256="0" * 64)
    free = KVCache.load(files / "plain-float32.kv")
    del free.facts["servable"]
    save(free, tmp_path / "free.kv")
    with pytest.raises(
        ValueError, match=r"free.kv: the cache is not in the form that engines take.*--servable"
    ):
        load_cache(tmp_path / "free.kv", model)
    cache = load_cache(files / "plain-float32.kv", model)
    for given, words in (
        ({"prompts": ""}, "at least one token"),
        ({}, "give either prompts or messages"),
        ({"prompts": ["a", "b"]}, "2 for a cache of 1 rows; load it with rows=2"),
        ({"prompts": "a", "so_far": torch.ones(1, 9).long()}, "placeholders"),
    ):
        with pytest.raises(ValueError, match=words):
            inputs_for(cache, tokenizer, **given)
    with pytest.raises(ValueError, match="not one that kvcat_nemo.serve.load_cache made"):
        inputs_for(DynamicCache(), tokenizer, "a")
    with pytest.raises(ValueError, match="rows=0"):
        fork(cache, rows=0)
