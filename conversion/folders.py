"""The folders that conversion reads and writes: their layout, and publishing them whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kvcat_nemo.common.folders import check_replaceable, empty, new_folder
from kvcat_nemo.models import hf_config as model_config
from kvcat_nemo.models.hf_config import read_json
from kvcat_nemo.runs.checkpoint_manifest import contents, hash_and_write_manifest, listed_names
from kvcat_nemo.runs.checkpoints import ACCEPT, find_checkpoint
from kvcat_nemo.runs.integrity import has_manifest, require_whole
from kvcat_nemo.runs.layout import BASE, CARD, MANIFEST, WEIGHTS
from kvcat_nemo.tokens import is_tokenizer_file, tokenizer_files

_SETTINGS = ("config.json", "generation_config.json")


def hf_side(folder: str | Path) -> Path:
    """The folder that holds config.json: `folder` itself, or hf/ in an imported folder."""
    folder = Path(folder)
    for candidate in (folder, folder / "hf"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(f"{folder} holds no config.json; give a Hugging Face folder or an imported one")


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder or of an imported one."""
    return model_config.read_config(hf_side(folder))


def copy_sidecars(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files, chat templates among them; weights are never copied."""
    target.mkdir(parents=True, exist_ok=True)
    settings = [Path(name) for name in _SETTINGS if (source / name).is_file()]
    for name in [*settings, *tokenizer_files(source)]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def find_weights(path: str | Path, *, unverified: bool = False) -> Path:
    """The distributed checkpoint at `path`: itself, its weights/, or a run folder's newest complete checkpoint.

    Raises:
        ValueError: as kvcat_nemo.runs.checkpoints.find_checkpoint.
    """
    return find_checkpoint(path, unverified=unverified).weights


def find_base(weights: Path) -> Path:
    """Where config and tokenizer of a checkpoint come from: its hf/, or the nearest kvcat_base.json.

    That file is looked for beside the weights and in up to three folders above the checkpoint (NeMo puts
    checkpoints into run/version/checkpoints/).

    A relative path in it counts from that file, or else from the working directory.

    Raises:
        ValueError: when neither is there, or the named folder is not.
    """
    weights = weights.absolute()  # not resolved: weights may be a link out of the run
    for level, folder in enumerate([weights, *weights.parents][:5]):
        if level <= 1 and (folder / "hf" / "config.json").is_file():
            return folder / "hf"
        if (folder / BASE).is_file():
            base = Path(read_json(folder / BASE)["base"])
            beside = folder / base  # an absolute base stays as it is
            if not (beside.is_dir() or base.is_dir()):
                raise ValueError(
                    f"{folder / BASE} names {base}, which is not there; name the base with --base"
                )
            return hf_side(beside if beside.is_dir() else base)
    raise ValueError(
        f"{weights} does not say which Hugging Face model it belongs to; name an imported or a Hugging Face "
        f"folder with --base"
    )


def check_base(base: Path, *, unverified: bool = False) -> None:
    """Compare config and tokenizer of a base (as `hf_side` or `find_base` gives it) with their manifest, where it has one.

    Raises:
        ValueError: when they changed, or the base is an imported folder without a manifest and that is not accepted.
    """
    folder = base.parent if (base.parent / CARD).is_file() else base
    if has_manifest(folder):
        require_whole(folder, only=lambda name: not name.startswith((f"{WEIGHTS}/", "model")))
    elif (folder / CARD).is_file() and not unverified:
        raise ValueError(
            f"{folder} has no {MANIFEST}: an older kvcat imported it. Import it again (--force), or, if you trust it, pass {ACCEPT}"
        )


def our_names(folder: Path) -> set[str] | None:
    """What of a folder `convert` or `export` wrote; None when it carries no complete mark."""
    # A complete training checkpoint is ours too, but nothing that a conversion may replace.
    if (names := listed_names(folder, kinds=("import", "export"))) is not None:
        return names
    if (folder / CARD).is_file() and (folder / WEIGHTS / "metadata.json").is_file():
        # Imported before folders had a manifest: the card was written last.
        return {name for name in contents(folder) if _is_imported(name)}
    return None


_WEIGHTS = re.compile(r"weights/(\.metadata|metadata\.json|common\.pt|__\d+_0\.distcp)")


def _is_imported(name: str) -> bool:
    """Whether `convert import` writes a file of this name."""
    beside = name.removeprefix("hf/")
    is_setting = beside != name and (beside in _SETTINGS or is_tokenizer_file(beside))
    return name in (CARD, MANIFEST) or is_setting or _WEIGHTS.fullmatch(name) is not None


def check_out(out: str | Path, *, force: bool, sources: Iterable[str | Path]) -> None:
    """Refuse a folder that must not be written, before any work.

    Raises:
        ValueError: when it exists and force is False, or is not ours, or lies within a folder that has a manifest.
    """
    out = Path(os.path.abspath(out))
    if out.is_dir() and not out.is_symlink() and not force and not empty(out):
        raise ValueError(f"{out} exists; choose another folder or pass --force to replace it")
    for folder in out.parents:
        if has_manifest(folder):
            raise ValueError(
                f"{out} lies within {folder}, which is complete and has a manifest: nothing may be added to it"
            )
    check_replaceable(out, our_names, sources=sources)


@contextlib.contextmanager
def published(
    out: str | Path, *, force: bool = False, sources: Iterable[str | Path] = (), kind: str, **facts
) -> Iterator[Path]:
    """A temporary sibling of `out` that gets its manifest and takes its name when the block ends without an error.

    Args:
        sources: what is read; `out` must not be one of them, nor a folder around one.
        kind, facts: of the manifest.

    Raises:
        ValueError: as `check_out`.
    """
    sources = list(sources)
    check_out(out, force=force, sources=sources)
    with new_folder(out, our_names, sources=sources, replace=force) as partial:
        yield partial
        hash_and_write_manifest(partial, kind=kind, **facts)


def require_space(folder: Path, needed: int) -> None:
    """Raises ValueError when the file system of `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free, the result needs {needed / 1e9:.1f} GB")
