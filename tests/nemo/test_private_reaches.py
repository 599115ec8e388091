"""nemo/ and recipes/ reach into other packages in nemo/compat.py alone, and compat notices when a reach is gone."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nemo

ROOT = Path(__file__).parents[2]
FILES = [
    f
    for folder in ("kvcat_nemo/nemo", "recipes", "kvcat_nemo/commands/train.py")
    for f in ([ROOT / folder] if folder.endswith(".py") else sorted((ROOT / folder).glob("*.py")))
    if f.name != "compat.py"
]
PUBLIC = {"_replace", "_asdict", "_fields"}  # of named tuples
PYTHONS = (
    set(dir(type)) | set(dir(object)) | {"__func__", "__post_init__", "__all__", "__name__", "__getattr__"}
)
LOOPS = {"fit_loop", "epoch_loop", "val_loop", "batch_progress"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def own_names(trees) -> set[str]:
    """Private names that this project gives to something."""
    out = set()
    for node in (n for tree in trees for n in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            out.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            out.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            out.add(node.attr)
    return out


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def reaches(tree: ast.AST, own: set[str]) -> list[str]:
    """Lines that take or change something inside of another package."""
    found, foreign = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if not a.name.startswith("kvcat_nemo")]
            foreign |= {(a.asname or a.name).split(".")[0] for a in node.names if a.name in names}
            found += [f"{node.lineno}: import {n}" for n in names if any(map(private, n.split(".")))]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("kvcat_nemo"):
            foreign |= {a.asname or a.name for a in node.names}
            parts = [*(node.module or "").split("."), *(a.name for a in node.names)]
            found += [f"{node.lineno}: import {p}" for p in parts if private(p)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            found += [f"{node.lineno}: {ast.unparse(node)}"] * (ast.unparse(node.args[0]) in foreign)
        if not isinstance(node, ast.Attribute):
            continue
        inner = node.value
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        patched = isinstance(node.ctx, ast.Store) and isinstance(inner, ast.Name) and inner.id in foreign
        special = node.attr.startswith("__") and (
            node.attr not in PYTHONS or node.attr == "__class__" and isinstance(node.ctx, ast.Store)
        )
        if patched or special or node.attr in LOOPS or private(node.attr) and node.attr not in own:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nothing_reaches_into_other_packages_outside_of_compat():
    trees = {file: ast.parse(file.read_text()) for file in FILES}
    own = own_names(trees.values())
    assert {f.name: found for f, tree in trees.items() if (found := reaches(tree, own))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from lightning.fabric.utilities.types import _PATH",
        "import nemo.lightning._strategy_lib",
        "import torch\ntorch.cuda.synchronize = None",
        "import torch\nsetattr(torch, 'x', 1)",
        "def f(trainer): trainer._results.reset()",
        "def f(config): return config.__arguments__",
        "def f(x): x.__class__ = int",
        "def f(trainer): return trainer.fit_loop.epoch_loop",
    ],
)
def test_each_kind_of_reach_is_found(line):
    assert reaches(ast.parse(line), {"_own"})
    assert not reaches(ast.parse("def f(x): return x._own, x._replace(a=1), x.__name__"), {"_own"})


def foreign_privates(cls) -> dict[str, str]:
    """Private names of a class' bases in other packages, methods and attributes."""
    out = {}
    for base in cls.__mro__[1:]:
        if base.__module__.startswith(("kvcat_nemo", "builtins", "abc", "typing")):
            continue
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            source = ""
        names = {n for n in vars(base) if private(n)} | set(re.findall(r"\bself\.(_[a-z]\w*)", source))
        out |= {n: f"{base.__module__}.{base.__qualname__}" for n in names}
    return out


def test_no_class_takes_a_private_name_of_its_bases():
    """What an override or an assignment to `self` would change without a word."""
    from kvcat_nemo.nemo.strategy import KVCatStrategy

    assert {"_checkpoint_io", "_process_group_backend"} <= set(foreign_privates(KVCatStrategy))
    found = []
    for file in FILES:
        package = {"nemo": "kvcat_nemo.nemo", "recipes": "kvcat_nemo.recipes"}.get(file.parent.name)
        if package is None or file.stem == "__init__":
            continue
        module = importlib.import_module(f"{package}.{file.stem}")
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            inherited = foreign_privates(cls)
            used = {n for n in vars(cls) if private(n)}
            used |= set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(cls)))
            found += [
                f"{cls.__qualname__}.{n} of {inherited[n]}" for n in used & set(inherited) if n != "_abc_impl"
            ]
    assert found == []


def test_compat_names_what_is_gone():
    from kvcat_nemo.nemo import compat

    assert compat.missing() == []
    for reach in compat.REACHES:
        (line,) = compat.missing([reach._replace(name=reach.name + "_of_yore")])
        assert reach.where in line and compat.CHECKED[reach.package] in line, line
    (line,) = compat.missing([compat.REACHES[0]._replace(where="nemo.lightning.of_yore")])
    assert "nemo.lightning.of_yore has no" in line


def test_an_import_of_another_version_ends_with_a_clear_error(monkeypatch):
    import nemo.lightning.io.pl as checkpoint_io

    from kvcat_nemo.nemo import compat

    monkeypatch.delattr(checkpoint_io, "_fix_tensors_device")
    monkeypatch.setattr(inspect, "getsource", lambda owner: "")
    monkeypatch.delitem(sys.modules, "kvcat_nemo.nemo.compat")
    with pytest.raises(
        ImportError, match=r"_fix_tensors_device any more .*pip install nemo-toolkit==2\.7\.3"
    ):
        importlib.import_module("kvcat_nemo.nemo.compat")
    monkeypatch.undo()
    assert sys.modules["kvcat_nemo.nemo.compat"] is compat


def test_versions_are_those_that_are_pinned():
    from kvcat_nemo.nemo.compat import CHECKED

    pins = (ROOT / "constraints.txt").read_text().lower()
    for package, version in CHECKED.items():
        assert re.search(rf"^{package}=={re.escape(version)}$", pins, re.M), package
