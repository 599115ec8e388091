"""What is installed, what it imports, and the contract on the direction of imports."""

import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import kvcat_nemo

ROOT = Path(__file__).parents[1]


def modules_after(code):
    """Top-level modules that a fresh interpreter has loaded after running `code`."""
    code += "\nimport sys; print('\\n'.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def submodules(package):
    folder = ROOT / "kvcat_nemo" / package
    # Triton is CUDA builds' own: its modules are imported where it is (tests/kernels/columns_cases.py).
    files = [path for path in folder.rglob("*.py") if not path.stem.endswith("_triton")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    assert names
    return "import " + ", ".join(name.removesuffix(".__init__") for name in names)


@pytest.mark.parametrize("package", ["method", "kernels"])
def test_the_science_imports_no_training_framework(package):
    loaded = modules_after(submodules(package))
    assert "torch" in loaded
    assert not loaded & {"megatron", "nemo", "nemo_run", "lightning", "transformers"}


def test_data_and_the_command_line_load_nothing_heavy_before_they_work():
    loaded = modules_after(submodules("data") + "\nimport kvcat_nemo.cli")
    assert "kvcat_nemo" in loaded
    assert not loaded & {"torch", "megatron", "nemo", "transformers", "pyarrow", "tokenizers"}


def test_version_and_entry_points():
    assert version("kvcat-nemo") == kvcat_nemo.__version__
    (script,) = entry_points(group="console_scripts", name="kvcat")
    assert script.value == "kvcat_nemo.cli:main"
    (recipes,) = entry_points(group="nemo_run.cli", name="kvcat")
    assert recipes.value == "kvcat_nemo.recipes"


def test_every_folder_of_the_package_is_installed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    outside = set(setuptools["package-dir"]) - {"kvcat_nemo"}
    inside = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "kvcat_nemo").rglob("__init__.py")}
    assert set(setuptools["packages"]) == {folder.replace("/", ".") for folder in inside} | outside


@pytest.fixture
def import_tree(tmp_path):
    """The package as it is installed: recipes/, conversion/ and launch/ inside kvcat_nemo/."""
    package = tmp_path / "kvcat_nemo"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kvcat_nemo", package, ignore=ignore)
    for name in ("recipes", "conversion", "launch"):
        shutil.copytree(ROOT / name, package / name, ignore=ignore)
    return package


def check_imports(package):
    command = [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"]
    command += ["--config", ROOT / ".importlinter"]
    return subprocess.run(command, cwd=package.parent, capture_output=True, text=True)


def test_imports_go_down_only(import_tree):
    done = check_imports(import_tree)
    assert done.returncode == 0, done.stdout
    contracts = (ROOT / ".importlinter").read_text().count("[importlinter:contract:")
    assert contracts > 2 and f"{contracts} kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("where", "line", "complaint"),
    [
        (
            "engine",
            "from kvcat_nemo.conversion import rule_breaker",
            "kvcat_nemo.engine is not allowed to import",
        ),
        ("conversion", "import kvcat_nemo.recipes", "kvcat_nemo.conversion is not allowed to import"),
        ("data", "def f():\n    import kvcat_nemo.method", "kvcat_nemo.data is not allowed to import"),
        ("tokens", "import kvcat_nemo.data", "kvcat_nemo.tokens is not allowed to import"),
        ("kernels", "import nemo.collections.llm", "kvcat_nemo.kernels is not allowed to import nemo"),
        (
            "method",
            "from transformers import Cache",
            "kvcat_nemo.method is not allowed to import transformers",
        ),
    ],
)
def test_the_contract_notices_an_import_that_goes_up(import_tree, where, line, complaint):
    (import_tree / "conversion" / "rule_breaker.py").touch()
    (import_tree / where / "rule_breaker.py").write_text(line + "\n")
    done = check_imports(import_tree)
    assert done.returncode == 1
    assert complaint in done.stdout
