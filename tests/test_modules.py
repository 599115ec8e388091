"""Modules of tests/ and benchmarks/ have one name each: two that share a top-level name were once taken for one another."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for name in ("tests", "benchmarks") for path in (ROOT / name).rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})

PATH_CHANGES = {
    "benchmarks/attention_matching_authors.py": "the authors' repository is no package; the run is a process of its own",
    "tests/kernels/te_cases.py": "stand-ins of flash-attn in a temporary folder, under the packages' own names",
    "tests/kernels/test_flash.py": "the same",
    "tests/evaluate/test_asked.py": "a protocol of a user, in a temporary folder",
    "tests/launch/test_image.py": "the image has these scripts and no package",
    "tests/engine/test_toy_policy.py": "policies of a user, in folders of their own",
    "tests/registry_assets/conftest.py": "the examples' package, which no install has",
    "tests/test_modules.py": "names it",
}
"""Files that may change sys.path, and why no module of this project gets a second name by it."""

ELSEWHERE = {
    "apex": "in NVIDIA's images",
    "flash_attn": "CUDA",
    "flash_attn_3": "CUDA",
    "flash_attn_interface": "CUDA",
    "transformer_engine": ".venv-te",
    "triton": ".venv-te",
    "kvpress": ".venv-compress",
    "compaction": "the authors' repository of Attention Matching",
    "evaluation": "the same",
    "models": "the same",
    "registry_assets": "examples/registry_assets, by kvcat_nemo.data.assets",
    "every_third": "tests/engine/toy_policies, as a user's folder",
    "one_weight": "the same",
    "protected": "launch/image, by tests/launch/test_image.py",
    "versions": "launch/image, by tests/launch/test_image.py",
}
"""Imported by tests or benchmarks, and not in .venv: where it is."""


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def changes_of_the_path(source: str) -> list[int]:
    """Lines that change sys.path, or hold code that does."""
    tree, out = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "syspath_prepend":
            out.append(node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            out += [node.lineno] * any(
                f"sys.path{how}" in node.value for how in (".insert(", ".append(", "[:0]", " =")
            )
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            out += [node.lineno] * (ast.unparse(node.func.value) == "sys.path")
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out += [node.lineno] * any(ast.unparse(t).startswith("sys.path") for t in targets)
    return out


def imports_of(source: str) -> set[str]:
    """Top-level names that a module imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_only_these_change_where_modules_are_looked_for():
    changing = {label(path): lines for path in FILES if (lines := changes_of_the_path(path.read_text()))}
    assert not set(changing) - set(PATH_CHANGES), (
        f"{ {name: changing[name] for name in set(changing) - set(PATH_CHANGES)} }: import the module by its whole name, "
        "tests.kernels.launches or benchmarks.step; a program is started with -m and cwd at the top of the checkout"
    )
    assert set(PATH_CHANGES) <= set(changing), "no longer needed in PATH_CHANGES"


@pytest.mark.parametrize("folder", FOLDERS, ids=label)
def test_every_folder_is_a_package(folder):
    """Without __init__.py pytest puts the folder on sys.path, and its modules get top-level names."""
    assert (folder / "__init__.py").is_file(), f"add an empty {label(folder / '__init__.py')}"


def test_no_module_is_imported_by_a_bare_name():
    """A bare name is the standard library's, an installed package's, or one of ELSEWHERE: never that of a neighbour."""
    unknown = {}
    for path in FILES:
        for name in imports_of(path.read_text()) - set(sys.stdlib_module_names) - set(ELSEWHERE):
            spec = importlib.util.find_spec(name)
            if spec is None or (spec.origin and Path(spec.origin).parent in FOLDERS):
                unknown.setdefault(name, []).append(label(path))
    unknown = {name: users for name, users in unknown.items() if name not in ("tests", "benchmarks")}
    assert not unknown


def test_no_folder_of_tests_is_searched_in_this_process():
    inside = {Path(entry).resolve() for entry in sys.path if entry} & set(FOLDERS)
    assert not inside


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nsys.path.insert(0, 'x')",
        "import sys\nsys.path[:0] = ['x']",
        "import sys\nsys.path += ['x']",
        "import sys\nsys.path = []",
        "def test(monkeypatch):\n    monkeypatch.syspath_prepend('x')",
        "CODE = 'import sys; sys.path.append(1)'",
    ],
)
def test_a_change_is_seen(source):
    assert changes_of_the_path(source)
