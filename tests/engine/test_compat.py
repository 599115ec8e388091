"""Nothing in engine/ or kernels/ reaches into another package but its compat modules, and those say what is gone."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from kvcat_nemo.common.private_api import Package
from kvcat_nemo.engine import hardware

hardware.enable()  # before Megatron is imported

ROOT = Path(__file__).parents[2] / "kvcat_nemo"
ROOMS = ("engine", "kernels")
FILES = [p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py")) if "compat" not in p.parts]
PUBLIC = {"_exit", "_asdict", "_replace", "_fields"}
"""Documented parts of the standard library, for all their underscores."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PUBLIC


def reaches(source: str) -> list[str]:
    """Private names that a module takes from what is not its own, patches of torch and Megatron, and swaps of classes."""
    tree = ast.parse(source)
    own = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if (
                isinstance(target, ast.Attribute)
                and isinstance(target.value, ast.Name)
                and target.value.id == "self"
            ):
                own.add(target.attr)
            elif isinstance(target, ast.Name):
                own.add(target.id)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            above = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if above or node.attr not in own:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("kvcat_nemo"):
            found += [f"{node.lineno}: {x.name}" for x in node.names if private(x.name)]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(str(name.value)):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Assign):
            for target in node.targets:
                root = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                patched = getattr(root, "id", "").startswith(("torch", "megatron")) and root is not target
                if patched or getattr(target, "attr", "") == "__class__":
                    found.append(f"{node.lineno}: {ast.unparse(target)} = …")
    return found


BAD = {
    "a private function": "torch._assert_async(x)",
    "a private method": "class A(B):\n    def _f(self):\n        return super()._f()",
    "a private import": "from torch.nn import _reduction",
    "by its name": "getattr(function, '_opoverload', None)",
    "a patch": "torch.cuda.synchronize = nothing",
    "another class": "layer.__class__ = cls",
}


@pytest.mark.parametrize("kind", BAD)
def test_the_rule_sees(kind):
    assert reaches(BAD[kind])


def test_the_rule_lets_own_names_pass():
    source = "class A:\n    def __init__(self):\n        self._x = os._exit\n    def _f(self):\n        return self._x, self._f"
    assert not reaches(source)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_reach_outside_compat(path):
    assert not reaches(path.read_text(encoding="utf-8"))


def test_no_private_method_of_another_package_is_overridden_outside_compat():
    found, classes = [], 0
    for path in FILES:
        if path.stem.endswith("_triton"):
            continue  # Triton is CUDA builds' own
        module = importlib.import_module(
            ".".join(["kvcat_nemo", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        )
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != module.__name__:
                continue
            classes += 1
            bases = [b for b in cls.__mro__[1:] if b.__module__.partition(".")[0] in ("megatron", "torch")]
            found += [
                f"{cls.__qualname__}.{name}" for name in vars(cls)
                if private(name) and inspect.isroutine(vars(cls)[name]) and any(name in vars(base) for base in bases)
            ]  # fmt: skip
    assert classes > 30
    assert not found


@pytest.mark.parametrize(
    ("name", "takes", "complaint"),
    [
        ("_gone", (), "Other._gone is not there in megatron-core"),
        ("method", ("a", "c", "d"), "Other.method does not take c, d in megatron-core"),
    ],
)
def test_what_is_gone_is_named(name, takes, complaint):
    class Other:
        def method(self, a, b):
            pass

    Other.__qualname__ = "Other"
    package = Package("megatron-core", "0.15.3")
    assert package.reach(Other, "method", "test", takes=("a",)) is Other.method
    with pytest.raises(ImportError, match=f"{complaint} [0-9.]+: .*to test; install megatron-core 0.15.3"):
        package.reach(Other, name, "test", takes=takes)


CHANGES = {
    "gates: the hook of the logits": (
        "gates",
        "megatron.core.models.gpt:GPTModel._postprocess",
        lambda self, states: None,
    ),
    "gates: arguments of a block": (
        "gates",
        "megatron.core.transformer.transformer_block:TransformerBlock.forward",
        lambda self, hidden_states: None,
    ),
    "dataset_index: the index": (
        "dataset_index",
        "megatron.core.datasets.gpt_dataset:GPTDataset._build_document_sample_shuffle_indices",
        None,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_megatron_is_refused_at_import(monkeypatch, change):
    """The module runs again as on a Megatron whose part is gone or takes other arguments."""
    name, place, replacement = CHANGES[change]
    module = importlib.import_module(f"kvcat_nemo.engine.compat.{name}")
    where, _, path = place.partition(":")
    cls, _, attribute = path.partition(".")
    holder = getattr(importlib.import_module(where), cls)
    if replacement is None:
        monkeypatch.delattr(holder, attribute)
    else:
        monkeypatch.setattr(holder, attribute, replacement)
    source = Path(module.__file__).read_text(encoding="utf-8")
    with pytest.raises(ImportError, match=rf"{attribute} (is not there|does not take .*) in megatron-core"):
        exec(compile(source, module.__file__, "exec"), {"__name__": "a second time"})
