"""The folders that conversion reads and writes: their layout, and publishing them whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcat_nemo.data.seal import BROKEN, UNFINISHED
from kvcat_nemo.tokens import tokenizer_files

CARD = "kvcat_checkpoint.json"
"""Marks an imported folder: OUT/weights (Megatron), OUT/hf (config and tokenizer) and this file."""
BASE = "kvcat_base.json"
"""{"base": folder} in a training run: where its config and tokenizer come from."""

_SETTINGS = ("config.json", "generation_config.json")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch it again") from None


def hf_side(folder: str | Path) -> Path:
    """The folder that holds config.json: `folder` itself, or hf/ in an imported folder."""
    folder = Path(folder)
    for candidate in (folder, folder / "hf"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(f"{folder} holds no config.json; give a Hugging Face folder or an imported one")


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder or of an imported one."""
    return read_json(hf_side(folder) / "config.json")


def copy_sidecars(source: Path, target: Path) -> None:
    """Copy configuration and tokenizer files, chat templates among them; weights are never copied."""
    target.mkdir(parents=True, exist_ok=True)
    settings = [Path(name) for name in _SETTINGS if (source / name).is_file()]
    for name in [*settings, *tokenizer_files(source)]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _is_weights(folder: Path) -> bool:
    return (folder / "metadata.json").is_file() and (folder / ".metadata").is_file()


def _is_unfinished(checkpoint: Path) -> bool:
    # NeMo sets the marker beside the checkpoint folder while it saves, and removes it at the end.
    # A checkpoint that was found damaged is renamed to …-broken.
    return checkpoint.with_name(checkpoint.name + UNFINISHED).exists() or checkpoint.name.endswith(BROKEN)


def _recency(checkpoint: Path) -> tuple[int, int, float]:
    """NeMo writes step and consumed samples into the name; "…-last" has the same ones, so time breaks the tie."""
    found = [re.search(rf"{word}=(\d+)", checkpoint.name) for word in ("step", "consumed_samples")]
    step, samples = (int(match.group(1)) if match else -1 for match in found)
    return step, samples, (checkpoint / "weights" / ".metadata").stat().st_mtime


def find_weights(path: str | Path) -> Path:
    """The distributed checkpoint at `path`: itself, its weights/, or a run folder's newest finished checkpoint.

    Raises:
        ValueError: when there is none, or only unfinished ones.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    for checkpoint, weights in ((path, path), (path, path / "weights"), (path.parent, path)):
        if _is_weights(weights) and (checkpoint is not path.parent or path.name == "weights"):
            if _is_unfinished(checkpoint):
                raise ValueError(f"{checkpoint} is unfinished: its -unfinished marker is still beside it")
            return weights
    found = [
        m.parent.parent
        for m in path.rglob("weights/metadata.json")
        # Hidden folders are conversions that have not been published.
        if _is_weights(m.parent) and not any(p.startswith(".") for p in m.relative_to(path).parts)
    ]
    finished = [checkpoint for checkpoint in found if not _is_unfinished(checkpoint)]
    if not finished:
        hint = f"; {len(found)} unfinished one(s) were skipped" if found else ""
        raise ValueError(f"{path} holds no Megatron distributed checkpoint (weights/metadata.json){hint}")
    return max(finished, key=_recency) / "weights"


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


def _replaceable(folder: Path) -> bool:
    # --force must not delete a folder that this project did not write.
    known = ((folder / CARD).is_file() and (folder / "weights").is_dir()) or (
        folder / "config.json"
    ).is_file()
    return known or not any(folder.iterdir())


@contextlib.contextmanager
def published(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its name when the block ends without an error.

    Raises:
        ValueError: when `out` exists and force is False, or is not a checkpoint folder.
    """
    out = Path(out).absolute()
    if out.exists() and not (force and out.is_dir()):
        raise ValueError(f"{out} exists; choose another folder or pass --force to replace it")
    if out.exists() and not _replaceable(out):
        raise ValueError(f"{out} is not a checkpoint folder; --force will not delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        print(f"note: {stale} is of an unfinished conversion; delete it if none is running", file=sys.stderr)
    partial = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        if out.exists():
            replaced = out.with_name(f".{out.name}.replaced-{uuid.uuid4().hex[:8]}")
            out.rename(replaced)
            partial.rename(out)
            shutil.rmtree(replaced)
        else:
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    # The rename must not reach the disk before the data does.
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def require_space(folder: Path, needed: int) -> None:
    """Raises ValueError when the file system of `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free, the result needs {needed / 1e9:.1f} GB")
