"""Runs te_cases.py in .venv-te, once for each of Transformer Engine's versions: its Python layer is real, its extension
a stand-in.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvcat_nemo.kernels.compat import te_package
from tests.kernels.te_versions import FACTS, rounded

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-te"
FEWEST = 154
"""Fewer cases than this, and something was not collected."""


@pytest.mark.parametrize("package", [facts.package for facts in FACTS.values()])
def test_transformer_engine_on_the_stand_in(tmp_path, package):
    folder = VENV / "transformer-engine" / package
    assert folder.is_dir(), f"{folder.relative_to(ROOT)} is missing: run `make setup`"
    report = tmp_path / "report.xml"
    python = str(VENV / "bin" / "python")
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("te_cases.py"))],
        capture_output=True,
        text=True,
        env={k: v for k, v in environment.items() if not k.startswith("NVTE_")},
        cwd=ROOT,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert int(suite.get("tests")) >= FEWEST, suite.attrib
    assert suite.get("skipped") == suite.get("failures") == suite.get("errors") == "0", suite.attrib


def test_the_pins_are_the_versions_whose_facts_are_known():
    """From the oldest to the newest version that is supported, both of them among the tested ones."""
    lines = (ROOT / "constraints-te.txt").read_text().splitlines()
    pins = [line.partition("==")[2] for line in lines if line.startswith("transformer-engine==")]
    assert pins == [facts.package for facts in FACTS.values()]
    assert (min(FACTS), max(FACTS)) == (te_package.OLDEST, te_package.NEWEST)


def test_rows_of_the_oldest_versions_statistics():
    rows = {
        1: 1024,
        512: 1024,
        1024: 1024,
        1025: 2048,
        3072: 4096,
        32768: 32768,
        32769: 65536,
        100_000: 131_072,
    }
    assert {tokens: rounded(tokens) for tokens in rows} == rows


@pytest.mark.skipif(
    sys.modules.get("transformer_engine") is not None, reason="Transformer Engine is loaded here"
)
def test_without_transformer_engine_the_error_says_so(monkeypatch):
    def missing(name):
        raise te_package.importlib.metadata.PackageNotFoundError(name)

    te_package.engine.cache_clear()
    monkeypatch.setattr(te_package.importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match="Transformer Engine is not installed"):
        te_package.engine()


def test_a_broken_installation_is_named(monkeypatch):
    te_package.engine.cache_clear()
    monkeypatch.setattr(te_package.importlib.metadata, "version", lambda name: "2.20.2")
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ValueError, match="install it whole"):
        te_package.engine()
    te_package.engine.cache_clear()
