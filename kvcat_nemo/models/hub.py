"""Which folder does a model's name mean? A local folder, or a repository of the Hugging Face hub; and a hub dataset's files.

huggingface_hub fetches, caches and signs in, so its own environment variables hold: HF_HOME and HF_HUB_CACHE (where files are
kept), HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT. Configuration, tokenizer and safetensors files are fetched, nothing else: neither
pickles nor code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from kvcat_nemo.models.hub_repository import Repository, files_inside
from kvcat_nemo.models.weights import INDEX, SINGLE, find_weights, index_files

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([\w.][\w./-]*))?")
_DATASET = re.compile(
    rf"hf://datasets/({_PART}/{_PART})(?:@(refs/convert/\w+|refs/pr/\d+|[\w.-]+))?(?:/(.+))?"
)
_CACHED = re.compile(
    rf".*[/\\](?:models|datasets)--({_PART})--({_PART})[/\\]snapshots[/\\]([0-9a-f]{{40}})(?:[/\\].*)?"
)
_SETTINGS = (
    *("*.json", "tokenizer*.model*", "*.model", "*.spm", "*.tiktoken", "vocab.txt", "merges.txt", "*.jinja"),
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_SPLITS = re.compile(r"(?:^|[/._-])(train|test|validation|valid|dev)(?=[/._-])")


def model_folder(name: str | Path, *, weights: bool = True, what: str = "model") -> Path:
    """The folder that a model's name means.

    Args:
        name: a folder, or a hub id: owner/name, or owner/name@revision (a branch, a tag or a commit). A folder wins over a
            hub id of the same text.
        weights: whether the weights are needed too, or the configuration and the tokenizer alone.
        what: what the name stands for, in messages.

    Raises:
        ValueError: neither a folder nor a hub id; a hub id that is not there, that is gated, that is not in the cache while
            the hub cannot be reached, that has no safetensors, or for which the disk is too small.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    match = None if path.exists() else _ID.fullmatch(str(name))
    if match is None:
        raise ValueError(
            f"{what} {str(name)!r}: no such folder; give a Hugging Face model folder, or a hub id such as Qwen/Qwen2.5-0.5B"
        )
    repository = Repository("model", *match.groups(), f"{what} {str(name)!r}: no such folder here, and ")
    folder = repository.fetch(lambda files: _model_files(repository, files, weights), ["config.json"])
    if weights:
        try:
            find_weights(folder)
        except ValueError as error:
            if not repository.from_cache:
                raise
            repository.refuse(
                f"the cache holds only a part of it ({error})",
                "fetch it once with the hub in reach (HF_HUB_OFFLINE unset)",
            )
    return folder


def is_dataset(source: str | Path) -> bool:
    """Whether a source that is no file here names a hub dataset: owner/name[@revision], or hf://datasets/… ."""
    return bool(_DATASET.fullmatch(str(source)) or _ID.fullmatch(str(source)))


def dataset_files(source: str, suffixes: Iterable[str]) -> list[Path]:
    """The data files of a hub dataset, fetched, in order of their names.

    Args:
        source: owner/name[@revision] takes every .jsonl, .jsonl.gz and .parquet file, which must be of one split;
            hf://datasets/owner/name[@revision]/PATTERN those that the pattern matches.
        suffixes: of files that can be read.

    Raises:
        ValueError: as `model_folder`; no file that can be read; several splits.
    """
    match = _DATASET.fullmatch(source) or _ID.fullmatch(source)
    if match is None:
        raise ValueError(
            f"source {source!r}: no hub dataset; write hf://datasets/owner/name@revision/PATTERN"
        )
    repo, revision, pattern = (*match.groups(), None)[:3]
    repository = Repository(
        "dataset", repo, revision, f"source {source!r}: no such file or folder here, and "
    )

    # Without a pattern no .txt: a licence is no document.
    kinds = tuple(s for s in suffixes if pattern or s != ".txt")

    def choose(files: list[str]) -> list[str]:
        found = sorted(f for f in files if f.lower().endswith(kinds) and (not pattern or fnmatch(f, pattern)))
        example = f"hf://datasets/{repo}/*train*"
        if not found:
            repository.refuse(
                f"the dataset has no {', '.join(kinds)} files{' that match' if pattern else ''}; it holds "
                f"{', '.join(sorted(files)[:5])} …", f"name files that can be read, as in {example}",
            )  # fmt: skip
        splits = {match[1] for f in found if (match := _SPLITS.search(f.lower()))}
        if not pattern and len(splits) > 1:
            repository.refuse(
                f"the dataset holds several splits ({', '.join(sorted(splits))})",
                f"choose among them: {example}",
            )
        return found

    folder = repository.fetch(choose, [pattern] if pattern else [f"*{kind}" for kind in kinds])
    return [folder / name for name in choose(files_inside(folder))]


def pinned(path: str | Path) -> str | None:
    """owner/name@commit of a folder or file in the hub's cache, which names the same bytes for ever; None of others."""
    match = _CACHED.fullmatch(os.path.abspath(path))
    return f"{match[1]}/{match[2]}@{match[3]}" if match else None


def recorded_name(path: str | Path) -> str:
    """What manifests call a model: owner/name@commit for one of the hub, else its path."""
    return pinned(path) or str(path)


def own_name(path: Path) -> str:
    """A short name for a model: the repository's, or the folder's."""
    hub = pinned(path)
    return hub.partition("@")[0].partition("/")[2] if hub else path.resolve().name


def _model_files(repository: Repository, files: list[str], weights: bool) -> list[str]:
    if "config.json" not in files:
        repository.refuse("the repository holds no config.json", "name a repository of a transformers model")
    chosen = [f for f in files if any(fnmatch(f, p) and f.count("/") == p.count("/") for p in _SETTINGS)]
    if not weights:
        return chosen
    if INDEX in files and SINGLE in files:
        repository.refuse(
            f"the repository holds both {SINGLE} and {INDEX}", "fetch it by hand and keep one of them"
        )
    if INDEX in files:
        return chosen + sorted(index_files(repository.one_file(INDEX).parent))
    if SINGLE not in files:
        other = sorted(f for f in files if f.endswith((".bin", ".pt", ".pth", ".gguf", ".safetensors")))
        repository.refuse(
            f"the repository has no {SINGLE} (it has {', '.join(other[:3]) or 'no weights'}); pickled weights can run code"
            " when loaded, so they are not taken", "name a repository or a revision with safetensors",
        )  # fmt: skip
    return [*chosen, SINGLE]
