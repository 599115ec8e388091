"""Small random models as Hugging Face folders."""

from __future__ import annotations

from tests.compress.hf_models import small_model


def save_model(folder, *, seed=0, **sizes):
    """A small random Llama with a tokenizer of bytes: 256 of its 260 tokens are the bytes, id 0 ends documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # transformers 5 renames some special tokens; the plain one stays.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", "<a>", "<b>", "<c>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    small_model(seed=seed, vocab_size=260, **sizes).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder
