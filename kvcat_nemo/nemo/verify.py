"""Is a checkpoint what was saved? Asked by all ranks together, each for its share of the files."""

from pathlib import Path

from nemo.utils import logging

from kvcat_nemo.data.seal import BROKEN, damage, read_seal
from kvcat_nemo.engine import agreement


def first_whole(candidates: list[Path], *, hashes: bool) -> Path:
    """The first candidate whose files are what its seal says. A collective call.

    Those before it are set aside (renamed to …-broken), with the reason in the log. One without a seal, named by hand,
    is taken as it is.

    Raises:
        ValueError: on every rank, when there is none.
    """
    reasons = []
    for path in candidates:
        try:
            seal = read_seal(path)
        except ValueError as error:
            if len(candidates) == 1:
                logging.warning(f"kvcat: not compared with anything: {error}")
                return path
            reasons.append(str(error))
            continue
        me, world = agreement.rank(), agreement.world_size()
        wrong = [
            line
            for found in agreement.gather(damage(path, seal, part=me, parts=world, hashes=hashes))
            for line in found
        ]
        wrong = sorted(set(wrong))
        if not wrong:
            if reasons:
                logging.warning(f"kvcat: resuming from {path} (step {seal.step}) instead")
            elif hashes:
                logging.info(
                    f"kvcat: {len(seal.files)} files of {path} are what was saved ({seal.bytes / 1e6:,.1f} MB)"
                )
            return path
        reasons += wrong
        logging.error(f"kvcat: damaged checkpoint, set aside as {path.name}{BROKEN}: {'; '.join(wrong)}")
        agreement.on_first_rank(lambda path=path: _set_aside(path))
    raise ValueError(
        f"no checkpoint is whole: {'; '.join(reasons)}. Put one back from a copy, or move {candidates[0].parent} away to start a new run"
    )


def _set_aside(path: Path) -> None:
    target = path.with_name(path.name + BROKEN)
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}-{number}{BROKEN}")
    path.rename(target)
