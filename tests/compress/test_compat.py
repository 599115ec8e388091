"""What compress/ reaches into of other packages: another version is refused by a clear error; no import runs in a circle."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import transformers
from transformers.models.llama import modeling_llama as llama

from kvcat_nemo.compress import compat
from tests.support.hf_models import small_model

ROOT = Path(__file__).parents[2] / "kvcat_nemo"


# What another version may lack: the attribute, what stands there instead, what the error says.
OTHER = type("Other", (), {})
LACKS = [
    ("transformers", "AttentionInterface", OTHER, "AttentionInterface.register"),
    ("transformers", "PretrainedConfig", OTHER, "PretrainedConfig._attn_implementation"),
    ("transformers", "DynamicCache", OTHER, "DynamicCache.layers"),
    (llama, "eager_attention_forward", lambda q, k, v, mask, scale: 0, "attention functions that are given"),
    (llama.LlamaRotaryEmbedding, "forward", lambda self, x, seq_len: 0, "LlamaRotaryEmbedding.forward"),
]


@pytest.mark.parametrize("where, name, other, what", LACKS, ids=[what for *_, what in LACKS])
def test_another_version_of_transformers_is_refused_at_import(where, name, other, what, monkeypatch):
    spec = importlib.util.spec_from_file_location("another_compat", compat.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    # transformers puts another module in its own place while it is loaded.
    monkeypatch.setattr(sys.modules[where] if isinstance(where, str) else where, name, other)
    with pytest.raises(ImportError) as error:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    message = str(error.value)
    assert message.startswith(f"transformers {transformers.__version__}: kvcat_nemo.compress needs {what}")
    assert message.endswith("install one that was checked: transformers==4.57.6 or transformers==5.2.0")


@pytest.mark.kvpress
@pytest.mark.parametrize("name", ["KVzipPress", "KeyRerotationPress"])
def test_another_version_of_kvpress_is_refused_when_it_is_used(name, monkeypatch):
    import kvpress

    monkeypatch.delattr(kvpress, name)
    with pytest.raises(ValueError, match=rf"kvpress 0.5.5: .* needs kvpress\.{name}.*kvpress==0\.5\.5"):
        compat.kvpress()
    monkeypatch.undo()
    assert compat.kvpress() is kvpress


def test_these_are_the_versions_that_the_tests_run_with():
    assert transformers.__version__ in compat.CHECKED["transformers"]


def test_the_model_is_left_as_it_was_found_also_after_an_error():
    model = small_model()
    before = model.config._attn_implementation
    modules = compat.attention_modules(model)
    with (
        pytest.raises(RuntimeError, match="mid-way"),
        compat.attention(model, "eager"),
        compat.left_as_found(model),
    ):
        assert model.config._attn_implementation == "eager" and modules[0].masked_key_indices is None
        modules[0].rotary_emb, model.model.forward = model.model.rotary_emb, lambda: None
        raise RuntimeError("mid-way")
    assert model.config._attn_implementation == before and "forward" not in vars(model.model)
    assert all(not hasattr(m, "masked_key_indices") and "rotary_emb" not in m._modules for m in modules)


REACHES = r"_attn_implementation|\._modules\b|__dict__|masked_key_indices|original_inv_freq|\.rope_type\b|kvzip_press"


def test_nothing_else_reaches_there():
    files = [path for room in ("compress", "evaluate") for path in (ROOT / room).rglob("*.py")]
    found = {path.name for path in files if re.search(REACHES, path.read_text(encoding="utf-8"))}
    assert found == {"compat.py"}


def imports_of(path: Path, names: set[str]) -> set[str]:
    """Modules of the project that a file imports, inside functions too; for type checkers alone does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import) and id(node) not in skipped:
            found |= {alias.name for alias in node.names}
    # Modules that are named by strings ("needle:Needle") are imports too.
    found |= {
        name
        for text in re.findall(r'"(\w+):\w+"', path.read_text())
        for name in names
        if name.endswith(f".{text}")
    }
    return found & names


def test_no_import_runs_in_a_circle():
    paths = {
        "kvcat_nemo." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for room in ("compress", "evaluate")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py"
    }
    left = {name: imports_of(path, set(paths)) for name, path in paths.items()}
    assert left["kvcat_nemo.evaluate.registry"] >= {"kvcat_nemo.evaluate.needle"}  # by string
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in circles, or above one: {left}"
