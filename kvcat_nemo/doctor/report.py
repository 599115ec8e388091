"""What the parts of `kvcat train doctor --gpu` found: checks, parts, and the report of all."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass
class Check:
    """One thing that was looked at."""

    name: str
    status: str
    """ok, failed or skipped."""
    text: str = ""
    """What is wrong, or why it was skipped; figures in words."""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class PartResult:
    """A part's checks and what they come to."""

    name: str
    status: str
    text: str
    seconds: float
    checks: list[Check] = field(default_factory=list)
    expected: bool = True
    """Whether this machine is expected to run it; False: a part for more GPUs than the machine has."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Skip(Exception):
    """A check or part that cannot run here, and why."""


def checked(name: str, function: Callable[[], Any]) -> Check:
    """Run a check: a Skip (or LookupError: nothing is claimed) skips it, any other exception fails it.

    The function returns figures (a dict), words, or nothing.
    """
    began = time.perf_counter()
    try:
        found = function()
    except (Skip, LookupError) as error:
        if isinstance(error, (KeyError, IndexError)):
            return _failed(name, error, began)
        return Check(name, SKIPPED, str(error), time.perf_counter() - began)
    except Exception as error:
        return _failed(name, error, began)
    figures = found if isinstance(found, dict) else {}
    return Check(name, OK, found if isinstance(found, str) else "", time.perf_counter() - began, figures)


def _failed(name: str, error: Exception, began: float) -> Check:
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f" [{Path(where.filename).name}:{where.lineno}]"
    return Check(name, FAILED, f"{type(error).__name__}: {error}{place}", time.perf_counter() - began)


def summed_up(name: str, checks: list[Check], seconds: float) -> PartResult:
    """A part is ok when something was looked at and nothing was wrong; with nothing looked at it is skipped."""
    failed = [check for check in checks if check.status == FAILED]
    done = [check for check in checks if check.status == OK]
    skipped = [check for check in checks if check.status == SKIPPED]
    if failed:
        status, text = (
            FAILED,
            f"{len(failed)} of {len(checks)} checks failed: {failed[0].name}: {failed[0].text}",
        )
    elif not done:
        status, text = SKIPPED, skipped[0].text if skipped else "nothing was looked at"
    else:
        status, text = OK, f"{len(done)} checks" + (f", {len(skipped)} skipped" if skipped else "")
    return PartResult(name, status, text, seconds, checks)


def run_part(name: str, function: Callable[..., Iterator[Check]], *arguments: Any) -> PartResult:
    """All checks of a part. One that raises outside a check is the part's end: skipped (Skip) or failed."""
    began, checks = time.perf_counter(), []
    try:
        checks.extend(function(*arguments))
    except Skip as error:
        checks.append(Check(name, SKIPPED, str(error)))
    except Exception as error:
        checks.append(_failed(name, error, began))
    return summed_up(name, checks, time.perf_counter() - began)


def exit_code(results: list[PartResult]) -> int:
    """0: every part is ok; 1: one failed; INCOMPLETE: none failed, but one was skipped, or there was none.

    Parts that are not expected of the machine do not count.
    """
    from kvcat_nemo.runs.exit_codes import INCOMPLETE

    if any(result.status == FAILED for result in results):
        return 1
    expected = [result for result in results if result.expected]
    return 0 if expected and all(result.status == OK for result in expected) else INCOMPLETE


def write(path: Path, machine: dict[str, Any], results: list[PartResult]) -> None:
    """The report as JSON; written after every part, so that a lost machine leaves what was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "format": "kvcat-gpu-doctor",
        "format_version": 1,
        "machine": machine,
        "exit_code": exit_code(results),
        "parts": [result.as_dict() for result in results],
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)
