"""One repository of the Hugging Face hub: fetched by huggingface_hub, or taken from its cache; failures told in one way."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import NoReturn


class HubError(ValueError):
    """What the hub or its cache cannot give; the message says what to do."""


@dataclass
class Repository:
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
            note += f", {len(files_inside(Path(found)))} files; the cache does not tell whether the dataset has more"
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


def files_inside(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
