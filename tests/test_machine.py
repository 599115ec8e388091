"""How tests share a machine: groups, the turnstile, costs against budgets, and the sum over several runs."""

import multiprocessing
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.machine import BUDGETS, FAR, PROCESSES, Turnstile, group_of, part_of

ROOT = Path(__file__).resolve().parents[1]
RUN = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}">{}</testsuite></testsuites>'
CASE = '<testcase classname="{}" name="x"><properties><property name="cpu_seconds" value="{}"/></properties></testcase>'


def total(tmp_path, *runs):
    paths = []
    for number, (*counts, cases) in enumerate(runs):
        paths.append(tmp_path / f"{number}.xml")
        paths[-1].write_text(RUN.format(*counts, "".join(CASE.format(*case) for case in cases)))
    return subprocess.run(
        [sys.executable, "-m", "tests.totals", *paths], capture_output=True, text=True, cwd=ROOT
    )


def test_runs_are_added_up(tmp_path):
    done = total(tmp_path, (10, 0, 0, 2, ()), (5, 0, 0, 0, ()))
    assert (done.stdout.splitlines()[-1], done.returncode) == ("total: 13 passed, 0 failed, 2 skipped", 0)


@pytest.mark.parametrize(
    "runs",
    [
        [(10, 0, 0, 0, ()), (5, 1, 1, 0, ())],
        [(10, 1, 0, 0, ()), (5, 0, 0, 0, ())],
        [(10, 0, 0, 0, ()), (5, 0, 1, 0, ())],
    ],
)
def test_one_failure_or_error_in_any_run_fails(tmp_path, runs):
    done = total(tmp_path, *runs)
    failed = sum(run[1] + run[2] for run in runs)
    assert done.stdout.splitlines()[-1] == f"total: {15 - failed} passed, {failed} failed, 0 skipped"
    assert done.returncode == 1


def test_costs_are_added_by_part_and_compared_with_the_budget(tmp_path):
    """A part far over its budget is named; the run does not fail for it."""
    much = FAR * BUDGETS["tests/method"]
    cases = [("tests.method.test_a", much), ("tests.method.test_b.Class", 1.0), ("tests.test_cli", 2.5)]
    done = total(tmp_path, (3, 0, 0, 0, cases))
    assert done.returncode == 0
    first, second, last = done.stdout.splitlines()
    assert f"(tests/method {much + 1:.0f}, tests 2)" in first
    assert (
        second
        == f"OVER BUDGET: tests/method took {much + 1:.0f} CPU seconds, its budget is {BUDGETS['tests/method']}"
    )
    assert last.startswith("total: 3 passed")
    unknown = total(tmp_path, (1, 0, 0, 0, [("tests.cellar.test_a", 1.0)]))
    assert "NO BUDGET: tests/cellar took 1 CPU seconds" in unknown.stdout


def test_every_part_has_a_budget_and_contributing_says_the_same():
    parts = {part_of(str(path.relative_to(ROOT))) for path in (ROOT / "tests").rglob("test_*.py")}
    assert parts <= set(BUDGETS), "give the part a budget in tests/support/machine.py and CONTRIBUTING.md"
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = {name: int(value) for name, value in re.findall(r"^\| `(tests[a-z_/]*)` \| (\d+) \|", text, re.M)}
    assert table == BUDGETS


def test_all_budgets_together_fit_forty_minutes_on_two_cores():
    """Set-up and lint take some five minutes; two workers keep two cores busy to about four fifths."""
    assert sum(BUDGETS.values()) <= (40 - 5) * 60 * 2 * 0.8


def test_files_of_several_processes_are_one_group(tmp_path):
    for name, text in (
        ("plain", "pytest.mark.nemo"),
        ("ranks", "pytest.mark.multiprocess"),
        ("jobs", "[pytest.mark.slurm]"),
    ):
        (tmp_path / f"test_{name}.py").write_text(text)
    groups = {name: group_of(tmp_path / f"test_{name}.py") for name in ("plain", "ranks", "jobs")}
    assert groups == {"plain": str(tmp_path / "test_plain.py"), "ranks": PROCESSES, "jobs": PROCESSES}


def stay(folder, alone, results):
    with Turnstile(folder).enter(alone):
        began = time.monotonic()
        time.sleep(0.4)
        results.put((alone, began, time.monotonic()))


def test_who_is_alone_has_nobody_beside(tmp_path):
    """Two that share overlap; whoever is alone overlaps with none, and is not passed by those who come later."""
    results = multiprocessing.get_context("fork").Queue()
    everyone = []
    for alone in (False, False, True, False):
        everyone.append(
            multiprocessing.get_context("fork").Process(target=stay, args=(tmp_path, alone, results))
        )
        everyone[-1].start()
        time.sleep(0.1)
    spans = [results.get(timeout=30) for _ in everyone]
    for one in everyone:
        one.join(30)
    (single,) = [span for span in spans if span[0]]
    shared = sorted(span for span in spans if not span[0])
    assert all(span[2] <= single[1] or span[1] >= single[2] for span in shared)
    assert shared[1][1] < shared[0][2]  # the first two
    assert shared[2][1] >= single[2]  # who came after


def test_workers_take_whole_files_and_the_long_group_first(pytester):
    """A real run of two workers: no file is split, files of several processes are on one worker, a clock comes last."""
    conftest = (
        (ROOT / "tests" / "conftest.py")
        .read_text(encoding="utf-8")
        .replace('pytest_plugins = ["pytester"]', "")
    )
    plain = (
        "import pytest, time\n@pytest.mark.parametrize('n', range(4))\ndef test_plain(n): time.sleep(0.02)\n"
    )
    several = plain.replace("@pytest", "@pytest.mark.multiprocess\n@pytest").replace("plain", "ranks")
    clock = "import pytest\n@pytest.mark.alone\ndef test_clock(): pass\n"
    pytester.makepyfile(
        conftest=conftest, test_a=plain, test_b=plain, test_c=clock, test_d=several, test_e=several
    )
    pytester.makeini(
        f"[pytest]\npythonpath = {ROOT}\nmarkers =\n  alone\n  multiprocess\n  slurm\n  kvpress\n  vllm\n"
    )
    arguments = ("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder", "-v", "-p", "no:cacheprovider")
    done = pytester.runpytest_subprocess(*arguments)
    ran = [re.match(r"\[(gw\d)\].* (test_\w)\.py", line) for line in done.outlines if " PASSED " in line]
    workers: dict[str, set[str]] = {}
    for found in ran:
        workers.setdefault(found[2], set()).add(found[1])
    assert len(ran) == 17 and all(len(on) == 1 for on in workers.values()), done.outlines
    assert workers["test_d"] == workers["test_e"] and ran[-1][2] == "test_c"
