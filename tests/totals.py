"""Adds up what pytest wrote of several runs: `python tests/totals.py RUN.xml…`, one line, exit 1 on failures."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET


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


if __name__ == "__main__":
    result = totals(sys.argv[1:])
    print("total: " + ", ".join(f"{count} {what}" for what, count in result.items()))
    sys.exit(bool(result["failed"]))
