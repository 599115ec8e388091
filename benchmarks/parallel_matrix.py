"""The whole parallel matrix (tests/engine/matrix_cases.py): by how much each layout differs from one process.

Runs real gloo processes on this machine, at most four at a time; writes benchmarks/parallel_matrix.json and the tables of
docs/parallelism.md. With --only, the other cases keep their figures. Exits with 1 when a case exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.smoke import Child, add_option, program, shrink
from kvcat_nemo.common.files import new_file
from kvcat_nemo.runs.provenance import git_revision, manifest
from tests.engine import matrix_run
from tests.engine.matrix_cases import CASES, Case
from tests.engine.matrix_run import Difference, difference, run_cases

ROOT = Path(__file__).resolve().parents[1]

SMOKE = next(c.name for c in CASES if c.short and c.processes == 2)
OUT = ROOT / "benchmarks" / "parallel_matrix.json"


def row(c: Case, found: Difference) -> dict:
    """A case's line of the report. Gradients are gathered by kind of parameter, over layers and ranks."""
    kinds: dict[str, float] = {}
    for name, value in found.gradients.items():
        kind = name.partition("+")[2].removeprefix("decoder.")
        if kind.startswith("layers."):
            kind = kind.split(".", 2)[2]
        kinds[kind] = max(kinds.get(kind, 0.0), value)
    parts: dict[str, float] = {}
    for name, value in found.figures.items():  # a figure's groups are one kind too
        parts[name.partition("/group")[0]] = max(parts.get(name.partition("/group")[0], 0.0), value)
    return {
        **described(c),
        "masks_compared": found.masks,
        "figures": _rounded(parts),
        "norms": _rounded(found.norms),
        "gradients": _rounded(kinds),
        "largest": _rounded({"": found.largest})[""],
        "wrong": found.over(c.tolerance),
        "revision": git_revision(ROOT),
    }


def described(c: Case) -> dict:
    return {
        "case": c.name,
        "processes": c.processes,
        "layout": c.layout,
        "options": c.options,
        "recipe": c.recipe,
        "tolerance": c.tolerance,
        "reason": c.reason,
        "in_make_test": c.short,
    }


def still_true(path: Path) -> dict[str, dict]:
    """Case name → its line of an earlier report, of cases that are computed as they were then.

    Another tolerance does not make a measured difference untrue: it is set beside the case's present one.
    """
    earlier = {r["case"]: r for r in json.loads(path.read_text())["cases"]} if path.exists() else {}
    out = {}
    for c in CASES:
        r, now = earlier.get(c.name), json.loads(json.dumps(described(c)))
        if r and all(r[key] == now[key] for key in ("processes", "layout", "options", "recipe")):
            out[c.name] = r | now
    return out


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.2g}") for name, value in sorted(values.items())}


def write(rows: list[dict], seconds: float, out: Path) -> None:
    head = manifest(seconds=round(seconds), cases=len(rows))
    lines = ",\n".join(json.dumps(r, allow_nan=False) for r in rows)
    with new_file(out) as path:
        path.write_text('{"manifest": ' + json.dumps(head) + ',\n"cases": [\n' + lines + "\n]}\n")


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="cases whose name begins so (repeatable)"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page-only", action="store_true", help="write the page from --out and run nothing")
    add_option(parser)
    return shrink(parser.parse_args(argv), parser, only=[SMOKE])


def main(argv=None) -> int:
    from benchmarks import parallel_page

    args = arguments(argv)
    wrong = 0
    if not args.page_only:
        cases = [c for c in CASES if not args.only or c.name.startswith(tuple(args.only))]
        if args.smoke:
            cases = [c for c in cases if c.name == SMOKE]  # other names begin so too
        if not cases:
            sys.exit(
                f"--only {' '.join(args.only)}: no case begins so; they are\n  "
                + "\n  ".join(c.name for c in CASES)
            )
        began = time.time()
        if args.smoke:  # what is imported here is there at once
            matrix_run.start_rank = lambda arguments, environment, log: Child(
                lambda: program(matrix_run.PROGRAM, arguments, environment), log
            )
        with tempfile.TemporaryDirectory() as folder:
            results = run_cases(cases, Path(folder), timeout=600)
        measured = {c.name: row(c, difference(c, *results[c.name])) for c in cases}
        kept = still_true(args.out) if args.only else {}
        rows = [(kept | measured)[c.name] for c in CASES if c.name in kept | measured]
        write(rows, time.time() - began, args.out)
        for name, r in measured.items():
            wrong += bool(r["wrong"])
            print(f"{'WRONG' if r['wrong'] else 'ok':6}{r['largest']:<9.2g}of {r['tolerance']:<9.2g}{name}")
            for text in r["wrong"][:5]:
                print(f"      {text}")
        print(f"{len(measured)} cases, {wrong} wrong, {time.time() - began:.0f} s")
    if args.out == OUT:
        parallel_page.write()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
