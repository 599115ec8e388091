"""Token ids of parts of a text, for contexts that are put together from parts."""

from __future__ import annotations


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text that stands inside a longer one: no special tokens, none recognised in it."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def beginning(tokenizer) -> list[int]:
    """Tokens that the tokenizer puts before a text by itself: Llama's begin-of-text, nothing for Qwen2 and SmolLM2."""
    whole, plain = tokenizer("a").input_ids, encode(tokenizer, "a")
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)]


def answer_ids(tokenizer, before: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of `before` and of the answer behind it, as the tokenizer parts the whole of both.

    Where a token would span the border, the two are tokenised apart.
    """
    first, whole = encode(tokenizer, before), encode(tokenizer, before + answer)
    if whole[: len(first)] == first and len(whole) > len(first):
        return first, whole[len(first) :]
    return first, encode(tokenizer, answer)
