"""Every Triton kernel compiles to machine code of the GPUs that training is meant for; the interpreter compiles nothing."""

import ast
import json
import os
import subprocess
from pathlib import Path

import pytest

import kvcat_nemo.kernels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = ROOT / ".venv-te" / "bin" / "python"
KERNELS = Path(kvcat_nemo.kernels.__file__).parent
MODULES = {
    "attention/columns_forward_triton.py",
    "attention/columns_backward_triton.py",
    "attention/own_slot_triton.py",
    "losses/row_losses_triton.py",
}
CAPABILITIES = {"A100": 80, "H100": 90, "B200": 100}


def launched(module: Path) -> set[str]:
    """Names of a module's kernels that its functions launch: kernel[grid](...)."""
    calls = [node.func for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Call)]
    return {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}


def marked(module: Path) -> set[str]:
    """Names of a module's functions under @triton.jit."""
    functions = [
        node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.FunctionDef)
    ]
    return {f.name for f in functions if any(ast.unparse(d) == "triton.jit" for d in f.decorator_list)}


def test_no_other_module_has_kernels():
    having = {
        str(path.relative_to(KERNELS)) for path in KERNELS.rglob("*.py") if launched(path) & marked(path)
    }
    assert having == MODULES, "triton_compile.py compiles the kernels of those alone"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """[capability][kernel] → launches that were compiled, without a cache of earlier runs."""
    assert PYTHON.exists(), f"{PYTHON.relative_to(ROOT)} is missing: run `make setup`"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [PYTHON, HERE / "triton_compile.py", *map(str, CAPABILITIES.values())],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("gpu", CAPABILITIES)
def test_kernels_compile(compiled, gpu):
    expected = set().union(*(launched(KERNELS / module) for module in MODULES))
    launches = compiled[str(CAPABILITIES[gpu])]
    assert len(expected) == 9 and set(launches) == expected
    assert min(launches.values()) >= 2, "bf16 and float32 at least"
