"""Compares checkpoints with their manifests before they are loaded; all ranks together, each for its share of the files."""

from pathlib import Path

from nemo.utils import logging

from kvcat_nemo.engine import rank_sync
from kvcat_nemo.runs.integrity import examine, has_manifest
from kvcat_nemo.runs.layout import BROKEN
from kvcat_nemo.runs.retention import set_aside


def first_whole(candidates: list[Path], *, hashes: bool, unverified: bool = False) -> Path:
    """The first candidate whose files are what its manifest says. A collective call.

    Those before it are set aside (renamed to …-broken), with the reason in the log.

    Args:
        unverified: take one that has no manifest, when it is the only one.

    Raises:
        ValueError: on every rank, when there is none.
    """
    reasons = []
    for path in candidates:
        if unverified and len(candidates) == 1 and not has_manifest(path):
            logging.warning(f"kvcat: {path} has no manifest: not compared with anything (resume.unverified)")
            return path
        wrong, damaged, manifest = _examine(path, hashes)
        if not wrong:
            if reasons:
                logging.warning(f"kvcat: resuming from {path} (step {manifest.step}) instead")
            elif hashes:
                logging.info(
                    f"kvcat: {len(manifest.files)} files of {path} are what was saved ({manifest.bytes / 1e6:,.1f} MB)"
                )
            return path
        reasons += wrong
        if damaged:
            logging.error(f"kvcat: damaged checkpoint, set aside as {path.name}{BROKEN}: {'; '.join(wrong)}")
            rank_sync.on_first_rank(lambda path=path: set_aside(path))
    raise ValueError(
        f"no checkpoint is whole: {'; '.join(reasons)}. Put one back from a copy, or move {candidates[0].parent} away to start a new run"
    )


def whole_base(base: Path, *, hashes: bool, unverified: bool) -> None:
    """Compare a base's files with its manifest; one without a manifest must have been accepted. A collective call.

    Raises:
        ValueError: on every rank, when a file differs.
    """
    if not has_manifest(base):
        if not unverified:
            raise ValueError(
                f"{base} has no manifest: nothing tells whether it is whole; set resume.unverified=True if you trust it"
            )
        logging.warning(f"kvcat: {base} has no manifest: not compared with anything (resume.unverified)")
        return
    wrong, _, manifest = _examine(base, hashes)
    if wrong:
        raise ValueError(
            f"resume.base: {'; '.join(wrong)}. Import it again: kvcat convert import HF_DIR {base} --force"
        )
    if hashes:
        logging.info(
            f"kvcat: {len(manifest.files)} files of {base} are what was written ({manifest.bytes / 1e6:,.1f} MB)"
        )


def _examine(path: Path, hashes: bool):
    """What is wrong, whether it is damaged, and the manifest: the same on every rank."""
    found = rank_sync.gather(
        examine(path, hashes=hashes, part=rank_sync.rank(), parts=rank_sync.world_size())
    )
    wrong = sorted({line for one in found for line in one.lines})
    return wrong, any(one.damaged for one in found), found[0].manifest
