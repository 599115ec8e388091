"""Records as a file of JSON lines, which appears when it is complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from kvcat_nemo.common.files import check_jsonl_target, new_file


def write_jsonl(
    out: str | Path,
    records: Callable[[], Iterable[dict]],
    is_ours: Callable[[dict], bool],
    what: str,
    *,
    force: bool,
    say: Callable[[str], None],
) -> Path:
    """Write what `records` yields, unless the file is there already.

    Args:
        is_ours: whether a record of an existing file is one that may be replaced.
        what: the records' name in messages.

    Raises:
        ValueError: `out` doesn't end in .jsonl, or is somebody else's file.
    """
    out = Path(out)
    if not out.name.endswith(".jsonl"):
        raise ValueError(f"{out}: the file's name must end in .jsonl")
    if out.exists() and not force:
        say(f"{out}: already there, re-used (--force writes it again)")
        return out
    check_jsonl_target(out, lambda record: isinstance(record, dict) and is_ours(record))
    count = 0
    with new_file(out) as temporary, open(temporary, "w", encoding="utf-8") as lines:
        for count, record in enumerate(records(), 1):  # noqa: B007 - the last count is told
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    say(f"{out}: {count} {what}")
    return out
