"""Which folder does a model's name mean? A local folder, or a repository of the Hugging Face hub; and a hub dataset's files.

huggingface_hub fetches, caches and signs in, so its own environment variables hold: HF_HOME and HF_HUB_CACHE (where files are
kept), HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT. Configuration, tokenizer and safetensors files are fetched, nothing else: neither
pickles nor code.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import NoReturn

from kvcat_nemo.models.weights import INDEX, SINGLE, find_weights, index_files

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([\w.][\w./-]*))?")
_DATASET = re.compile(rf"hf://datasets/({_PART}/{_PART})(?:@([\w.-]+))?(?:/(.+))?")
_CACHED = re.compile(
    rf".*[/\\](?:models|datasets)--({_PART})--({_PART})[/\\]snapshots[/\\]([0-9a-f]{{40}})(?:[/\\].*)?"
)
_SETTINGS = (
    *("*.json", "tokenizer*", "*.model", "*.spm", "*.tiktoken", "vocab.txt", "merges.txt", "*.jinja"),
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_SPLITS = re.compile(r"(?:^|[/._-])(train|test|validation|valid|dev)(?=[/._-])")


class HubError(ValueError):
    """What the hub or its cache cannot give; the message says what to do."""


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
    repository = _Repository("model", *match.groups(), f"{what} {str(name)!r}: no such folder here, and ")
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
    repository = _Repository(
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
    return [folder / name for name in choose(_inside(folder))]


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


def _model_files(repository: _Repository, files: list[str], weights: bool) -> list[str]:
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


@dataclass
class _Repository:
    """One repository at the hub or in its cache, and how failures are told."""

    kind: str
    repo: str
    revision: str | None
    begins: str
    """How each message begins."""
    commit: str | None = None
    from_cache: bool = False
    """Whether the hub was not asked: what the cache holds may be a part."""

    def refuse(self, why: str, fix: str) -> NoReturn:
        raise HubError(f"{self.begins}{why}; {fix}")

    def fetch(self, choose: Callable[[list[str]], list[str]], needed: list[str]) -> Path:
        """The folder of the repository's snapshot.

        Args:
            choose: takes from the list of all files those to fetch.
            needed: patterns of what must be there where the hub is not asked.
        """
        from huggingface_hub import HfApi, constants, errors, snapshot_download

        where = f"hub id {self.repo!r}" + (f" at {self.revision!r}" if self.revision else "")
        try:
            if constants.HF_HUB_OFFLINE:
                return self._cached("HF_HUB_OFFLINE is set", needed)
            info = HfApi().repo_info(
                self.repo, repo_type=self.kind, revision=self.revision, files_metadata=True
            )
            self.commit = info.sha
            sizes = {file.rfilename: file.size or 0 for file in info.siblings}
            chosen = choose(list(sizes))
            self._check_space({name: sizes[name] for name in chosen if name in sizes})
            # By branch or tag where one was given: the cache then knows it by that name, without the hub too.
            revision = self.revision or constants.DEFAULT_REVISION
            patterns = [escape(name) for name in chosen]
            found = snapshot_download(
                self.repo, repo_type=self.kind, revision=revision, allow_patterns=patterns
            )
            missing = [name for name in chosen if not (Path(found) / name).is_file()]
            if missing:
                self.refuse(f"the download ended before {missing[0]}", "run the same command again")
            return Path(found)
        except errors.GatedRepoError:
            self.refuse(
                f"{where} is gated: the hub gives it to those who accepted its terms",
                "accept them on its page, then set HF_TOKEN (or run `hf auth login`)",
            )
        except errors.RevisionNotFoundError:
            self.refuse(
                f"{self.repo!r} has no revision {self.revision!r}", "name a branch, a tag or a commit of it"
            )
        except errors.RepositoryNotFoundError:
            self.refuse(
                f"the hub shows no {self.kind} {self.repo!r}",
                "correct the name; for a private one set HF_TOKEN (or run `hf auth login`)",
            )
        except errors.HFValidationError as error:
            self.refuse(f"{where} is none ({error})", "correct it")
        except HubError:
            raise
        except Exception as error:  # requests' and httpx' own, by the version of huggingface_hub
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.refuse(
                    f"the disk of {constants.HF_HUB_CACHE} is full",
                    "make room, or set HF_HUB_CACHE to another disk",
                )
            return self._cached(
                f"the hub could not be asked ({str(error).strip().partition(chr(10))[0] or type(error).__name__})",
                needed,
            )

    def one_file(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.repo, name, repo_type=self.kind, revision=self.commit))

    def _cached(self, why: str, needed: list[str]) -> Path:
        from huggingface_hub import constants, errors, snapshot_download

        self.from_cache = True
        try:
            where = {"repo_type": self.kind, "revision": self.revision, "local_files_only": True}
            # From huggingface_hub 1 on it knows whether a fetched snapshot has all of them.
            found = snapshot_download(self.repo, allow_patterns=needed, **where)
        except (errors.LocalEntryNotFoundError, errors.HFValidationError):
            self.refuse(
                f"{why}, and {constants.HF_HUB_CACHE} does not hold the {self.kind} {self.repo!r}"
                + (f" at {self.revision!r}" if self.revision else ""),
                "fetch it once with the hub in reach, or give a local folder",
            )
        note = f"{self.repo}: {why}; taken from the cache: commit {Path(found).name}"
        if self.kind == "dataset":
            note += (
                f", {len(_inside(Path(found)))} files; the cache does not tell whether the dataset has more"
            )
        if self.kind == "dataset" or not constants.HF_HUB_OFFLINE:  # of a model in the cache all is known
            print(f"note: {note}", file=sys.stderr)
        return Path(found)

    def _check_space(self, sizes: dict[str, int]) -> None:
        from huggingface_hub import constants, try_to_load_from_cache

        def is_here(name: str) -> bool:
            found = try_to_load_from_cache(self.repo, name, repo_type=self.kind, revision=self.commit)
            return isinstance(found, str)

        needed = sum(size for name, size in sizes.items() if not is_here(name))
        folder = next(
            p for p in (Path(constants.HF_HUB_CACHE), *Path(constants.HF_HUB_CACHE).parents) if p.is_dir()
        )
        free = shutil.disk_usage(folder).free
        if needed > free:
            self.refuse(
                f"{self.repo!r} needs {needed / 1e9:.1f} GB more, and the disk of {constants.HF_HUB_CACHE} has "
                f"{free / 1e9:.1f} GB left", "make room, or set HF_HUB_CACHE to another disk",
            )  # fmt: skip


def _inside(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
