"""The generated tables of docs/parallelism.md: what is supported, how near it comes, and what is refused.

The page keeps its prose; between `<!-- matrix: NAME -->` and `<!-- end -->` stands what BLOCKS[NAME] returns, from the cases
and refusals of the tests and the figures of parallel_matrix.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from kvcat_nemo.common.files import new_file
from tests.engine.matrix_cases import CASES, FORMS
from tests.refusals import LAYOUT, MODEL, RUN

ROOT = Path(__file__).resolve().parents[1]

PAGE = ROOT / "docs" / "parallelism.md"
REPORT = ROOT / "benchmarks" / "parallel_matrix.json"
TESTS = {"MODEL": "tests/engine/test_stages.py", "RUN": "tests/nemo/test_recipes.py"}


def measured() -> dict[str, dict]:
    """Case name → its line of the report."""
    return {r["case"]: r for r in json.loads(REPORT.read_text())["cases"]} if REPORT.exists() else {}


def forms() -> str:
    """Forms of parallelism, how many cases show each, and the worst of them."""
    lines = [
        "| form | cases | of them in `make test` | largest difference in float64 | cases begin with |",
        "|---|---:|---:|---:|---|",
    ]
    rows = measured()
    for form, belongs in FORMS.items():
        cases = [c for c in CASES if belongs(c)]
        exact = [
            rows[c.name]["largest"]
            for c in cases
            if c.name in rows and "dtype" not in c.recipe and "updates" not in c.recipe
        ]
        first = "; ".join(c.name for c in cases[:3])
        worst = f"{max(exact):.1e}" if exact else "–"
        lines.append(f"| {form} | {len(cases)} | {sum(c.short for c in cases)} | {worst} | {first} |")
    return "\n".join(lines)


def cases() -> str:
    """Every case: its layout, tolerance, and what was measured."""
    lines = [
        "| case | processes | tolerance | largest: figure | gradient | masks equal | `make test` |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    rows = measured()
    for c in CASES:
        r = rows.get(c.name)
        figures = ["not measured"] * 2 + ["–"]
        if r:
            figures = [f"{max(r[k].values(), default=0):.1e}" for k in ("figures", "gradients")] + [
                str(r["masks_compared"])
            ]
        lines.append(
            f"| {c.name} | {c.processes} | {c.tolerance:.0e} | {' | '.join(figures)} | {'yes' if c.short else ''} |"
        )
    return "\n".join(lines)


def reasons() -> str:
    """Tolerances and why they are no smaller."""
    seen: dict[tuple[float, str], int] = {}
    for c in CASES:
        seen[c.tolerance, c.reason] = seen.get((c.tolerance, c.reason), 0) + 1
    lines = ["| tolerance | cases | because |", "|---:|---:|---|"]
    return "\n".join(lines + [f"| {t:.0e} | {n} | {reason} |" for (t, reason), n in sorted(seen.items())])


def refused() -> str:
    """Refused layouts, an example of each, what is accepted in its place, and the test."""
    lines = ["| refused | for example | accepted instead | test |", "|---|---|---|---|"]
    for refusals, test in ((MODEL + LAYOUT, TESTS["MODEL"]), (RUN, TESTS["RUN"])):
        for r in refusals:
            lines.append(f"| {r.form} | {_fields(r.given)} | {_fields(r.fix)} | {test} |")
    return "\n".join(lines)


def _fields(values: dict) -> str:
    return ", ".join(
        f"`{name.removeprefix('layout.')}={value}`".replace("|", "\\|") for name, value in values.items()
    )


BLOCKS = {"forms": forms, "cases": cases, "reasons": reasons, "refused": refused}


def rendered(page: str) -> str:
    """The page with every block as it should be.

    Raises:
        ValueError: when a block's place is missing.
    """
    for name, block in BLOCKS.items():
        place = re.compile(rf"(<!-- matrix: {name} -->\n)((?!<!-- matrix).)*?(<!-- end -->)", re.S)
        if not place.search(page):
            raise ValueError(f"docs/parallelism.md has no <!-- matrix: {name} --> … <!-- end -->")
        page = place.sub(lambda m, block=block: m[1] + block() + "\n" + m[3], page)
    return page


def write() -> None:
    text = rendered(PAGE.read_text(encoding="utf-8"))
    with new_file(PAGE) as path:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
