"""The files of a Hugging Face folder that make up its tokenizer and its chat templates."""

from __future__ import annotations

from pathlib import Path, PurePath

_PATTERNS = (
    "tokenizer*.json",  # tokenizer.json, tokenizer_config.json
    "tokenizer*.model*",  # sentencepiece, and the numbered ones of Mistral
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "source.spm",
    "tekken.json",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",  # named templates, one a file
)


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files in a folder, relative to it and in order of their names."""
    folder = Path(folder)
    found = {path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer: its definition, or the files that transformers makes one of."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
    return any((Path(folder) / name).is_file() for name in names)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name, relative to its folder, is one of a tokenizer's."""
    return any(
        PurePath(name).match(pattern) and name.count("/") == pattern.count("/") for pattern in _PATTERNS
    )
