"""The tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from kvcat_nemo.tokens.files import tokenizer_files


def load(folder: str | Path):
    """The fast tokenizer of a Hugging Face folder, as transformers loads it; nothing is looked for on a network.

    Raises:
        ValueError: no tokenizer there, one that cannot be loaded, or none that is fast (tokenizer.json).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"tokenizer {str(folder)!r} is not a folder; give a Hugging Face model folder")
    if not tokenizer_files(folder):
        raise ValueError(f"{folder}: no tokenizer there (neither tokenizer.json nor tokenizer_config.json)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
    except Exception as error:  # transformers raises a dozen kinds for a damaged folder
        raise ValueError(f"{folder}: the tokenizer can't be loaded ({error})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: {type(tokenizer).__name__} has no fast version (tokenizer.json)")
    return tokenizer
