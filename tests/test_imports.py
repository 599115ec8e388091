"""Every import of the project's own modules finds its module and its name, in functions too, where no import test looks."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "kvcat_nemo.recipes": ROOT / "recipes",
    "kvcat_nemo.conversion": ROOT / "conversion",
    "kvcat_nemo.launch": ROOT / "launch",
    "kvcat_nemo": ROOT / "kvcat_nemo",
    "benchmarks": ROOT / "benchmarks",
    "registry_assets": ROOT / "examples" / "registry_assets",
    "tests": ROOT / "tests",
}
"""pyproject.toml's package-dir, the benchmarks, the examples and the tests."""
FILES = sorted(
    path for name in ("kvcat_nemo", "recipes", "conversion", "launch", "benchmarks", "examples", "tests")
    for path in (ROOT / name).rglob("*.py")
)  # fmt: skip


def file_of(module: str) -> Path | None:
    """The module's file, or the folder of one without __init__.py; None when there is none."""
    package = next((name for name in PACKAGES if module == name or module.startswith(f"{name}.")), None)
    if package is None:
        return None
    path = PACKAGES[package].joinpath(*module.removeprefix(package).split(".")[1:])
    files = (x for x in (path / "__init__.py", path.with_suffix(".py")) if x.is_file())
    return next(files, path if path.is_dir() else None)


@functools.cache
def names_of(path: Path) -> set[str]:
    """What a module binds anywhere outside its functions' bodies; {"*"} where it answers __getattr__."""
    found: set[str] = set()
    if path.is_dir():
        return found
    waiting: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        waiting.extend(ast.iter_child_nodes(node))
    return {"*"} if "__getattr__" in found else found


def broken(source: str) -> list[str]:
    """Own imports in a module's text that do not resolve."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            wanted = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if not any(module == own or module.startswith(f"{own}.") for own in PACKAGES):
                continue
            path = file_of(module)
            if path is None:
                out.append(f"line {node.lineno}: no module {module}")
            elif name and not names_of(path) & {name, "*"} and file_of(f"{module}.{name}") is None:
                out.append(f"line {node.lineno}: no {name} in {module}")
    return out


def test_every_own_import_finds_its_name():
    found = {str(path.relative_to(ROOT)): broken(path.read_text(encoding="utf-8")) for path in FILES}
    assert len(found) > 300
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    from kvcat_nemo.data.seal import survey",
        "def f():\n    import kvcat_nemo.data.seal",
        "def f():\n    from kvcat_nemo.runs.checkpoints import surveyed",
    ],
)
def test_a_lost_module_and_a_lost_name_are_seen(source):
    (line,) = broken(source)
    assert line.startswith("line 2: no ")
