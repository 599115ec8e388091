"""A tiny tokenizer and small corpora, made on the spot."""

import gzip
import json

import pytest

TEXTS = [f"Document number {i} speaks of letters, digits {i * 37} and “quotes”." for i in range(30)]


def write_jsonl(path, records):
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A byte-level BPE fast tokenizer of 300 tokens with EOS `<end>` (id 0) and one more special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>", "<other>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    """Thirty documents in one .jsonl file."""
    records = [{"id": f"doc-{i}", "text": text} for i, text in enumerate(TEXTS)]
    return write_jsonl(tmp_path / "corpus.jsonl", records)
