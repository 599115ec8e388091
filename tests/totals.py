"""Adds up what pytest wrote of several runs: `python -m tests.totals RUN.xml…`; exit 1 on failures.

The last line counts the tests. Before it: the CPU seconds of every part, and the parts that are far over their budget. Those do
not fail the run: another processor takes other times.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

from tests.support.machine import BUDGETS, FAR, part_of


def totals(paths: list[str]) -> dict[str, int]:
    """Tests passed, failed (errors included) and skipped, over all runs."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for path in paths:
        for suite in ET.parse(path).getroot().iter("testsuite"):
            for key in counts:
                counts[key] += int(suite.get(key, 0))
    failed = counts["failures"] + counts["errors"]
    skipped = counts["skipped"]
    return {"passed": counts["tests"] - failed - skipped, "failed": failed, "skipped": skipped}


def costs(path: str) -> dict[str, float]:
    """Part → CPU seconds of one run."""
    out: dict[str, float] = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        seconds = sum(float(p.get("value")) for p in case.iter("property") if p.get("name") == "cpu_seconds")
        part = part_of(case.get("classname", "").replace(".", "/") + ".py")
        out[part] = out.get(part, 0.0) + seconds
    return out


def lines(path: str) -> list[str]:
    """What a run cost, in words."""
    found = costs(path)
    each = ", ".join(f"{part} {seconds:.0f}" for part, seconds in sorted(found.items(), key=lambda x: -x[1]))
    out = [f"CPU seconds of {path}: {sum(found.values()):.0f} ({each})"]
    for part, seconds in found.items():
        budget = BUDGETS.get(part)
        if budget is None:
            out.append(
                f"NO BUDGET: {part} took {seconds:.0f} CPU seconds; give it one in tests/support/machine.py"
            )
        elif seconds > FAR * budget:
            out.append(f"OVER BUDGET: {part} took {seconds:.0f} CPU seconds, its budget is {budget}")
    return out


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("\n".join(lines(name)))
    result = totals(sys.argv[1:])
    print("total: " + ", ".join(f"{count} {what}" for what, count in result.items()))
    sys.exit(bool(result["failed"]))
