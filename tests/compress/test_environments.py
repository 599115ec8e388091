"""compress/, evaluate/ and models/ need torch and transformers alone, and live with both generations of numpy and transformers."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("megatron", "nemo", "nemo_run", "lightning")
INSTALLED = {distribution.metadata["Name"].lower() for distribution in distributions()}


def loaded_after(code: str) -> set[str]:
    code += "\nimport sys; print('\\n'.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def modules(*packages: str) -> list[str]:
    files = [path for name in packages for path in (ROOT / "kvcat_nemo" / name).rglob("*.py")]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files
    ]


def test_no_training_framework_is_imported():
    names = modules("compress", "evaluate", "models")
    assert len(names) > 10
    loaded = loaded_after("import " + ", ".join(names))
    assert {"torch", "transformers"} <= loaded
    assert not loaded & {*FRAMEWORKS, "kvpress", "lm_eval"}  # the last two: only when they are used


def test_versions_are_those_that_the_environment_stands_for():
    """Two generations: else running the tests twice would show nothing."""
    if "nemo-toolkit" in INSTALLED:
        assert version("numpy").startswith("1.") and version("transformers").startswith("4.57.")
    else:
        assert int(version("numpy").split(".")[0]) >= 2 and version("transformers").startswith("5.2.")


@pytest.mark.kvpress
def test_the_second_environment_has_kvpress_and_no_framework():
    assert version("kvpress") == "0.5.5"
    assert not INSTALLED & {"megatron-core", "nemo-toolkit", "nemo-run", "nemo_run", "lightning"}
