"""Writes benchmarks/roofline.json, and the tables of docs/roofline.md between its markers; takes a second, needs no GPU.

The numbers are computed (roofline_counts.py), never measured; the page sets benchmarks/step.json's shares beside them.

    python -m benchmarks.roofline              # after a change of the counts, or of benchmarks/step.json
    python -m benchmarks.roofline --check      # say whether both files are up to date
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import roofline_counts, roofline_page
from benchmarks.smoke import add_option

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "roofline.json"
PAGE = ROOT / "docs" / "roofline.md"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    add_option(parser)
    arguments = parser.parse_args(argv)
    text = json.dumps(roofline_counts.result(), indent=1) + "\n"
    page = roofline_page.rendered(PAGE.read_text(encoding="utf-8"))
    stale = [
        path.relative_to(ROOT)
        for path, new in ((OUT, text), (PAGE, page))
        if not path.exists() or path.read_text(encoding="utf-8") != new
    ]
    if arguments.smoke:
        folder = Path(tempfile.mkdtemp(prefix="kvcat-smoke-"))
        (folder / OUT.name).write_text(text)
        (folder / PAGE.name).write_text(page)
        print(f"wrote {folder}")
        return 0
    if arguments.check:
        print(
            f"out of date: {', '.join(map(str, stale))}; run python -m benchmarks.roofline"
            if stale
            else "up to date"
        )
        return int(bool(stale))
    for path, new in ((OUT, text), (PAGE, page)):
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(new, encoding="utf-8")
        temporary.replace(path)
    print(f"wrote {OUT.relative_to(ROOT)} and the tables of {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
