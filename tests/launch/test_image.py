"""What the image's build protects and asserts, on made-up environments (the build itself: make image-test)."""

import sys
from pathlib import Path

import pytest

IMAGE = Path(__file__).parents[2] / "launch" / "image"
sys.path.insert(0, str(IMAGE))
import protected  # noqa: E402
import versions  # noqa: E402


def install(folder: Path, name: str, version: str, module: str | None = None) -> Path:
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if module:
        (folder / f"{module}.py").write_text("")
    return folder


@pytest.mark.parametrize("names", [("transformer-engine",) * 2, ("transformer_engine", "Transformer-Engine")])
def test_the_copy_that_is_imported_is_protected(tmp_path, names):
    """A system's package under a virtual environment's: two metadata folders, of which the first is what runs."""
    venv = install(tmp_path / "venv", names[0], "2.9.0")
    system = install(install(tmp_path / "system", names[1], "2.4.0"), "torch", "2.9.0")
    assert protected.protected([str(venv), str(system)]) == ["torch==2.9.0", "transformer-engine==2.9.0"]
    assert protected.protected([str(system), str(venv)]) == ["torch==2.9.0", "transformer-engine==2.4.0"]


def test_what_is_protected(tmp_path):
    kept = [
        "torch",
        "flash-attn",
        "flash_attn_3",
        "transformer_engine_torch",
        "nvidia-cudnn-cu12",
        "grouped_gemm",
    ]
    for name in [*kept, "megatron-core", "nemo-toolkit", "numpy", "nvidia-modelopt"]:
        install(tmp_path, name, "1.0")
    found = {line.partition("==")[0] for line in protected.protected([str(tmp_path)])}
    assert found == {protected.normal(name) for name in kept}


def test_another_version_than_the_pinned_is_named(tmp_path):
    wanted = versions.pins(IMAGE.parents[1] / "constraints.txt")
    assert wanted["megatron-core"] == "0.15.3" and wanted["nemo-toolkit"] == "2.7.3"
    found = protected.installed([str(install(tmp_path, "megatron-core", "0.16.0"))])
    assert versions.wrong_pin("megatron-core", found, wanted) == (
        "megatron-core 0.16.0 is installed, constraints.txt has 0.15.3"
    )
    assert versions.wrong_pin("nemo-run", found, wanted) == "nemo-run is not installed"
    right = protected.installed([str(install(tmp_path / "right", "megatron-core", "0.15.3"))])
    assert versions.wrong_pin("megatron-core", right, wanted) is None
    assert all(package in wanted for package in versions.PINNED.values())


def test_a_copy_elsewhere_that_hides_the_package_is_named(tmp_path):
    place = install(tmp_path / "venv", "megatron-core", "0.15.3", "megatron")
    distribution = protected.installed([str(place)])["megatron-core"]
    assert versions.wrong_file("megatron", str(place / "megatron.py"), distribution) is None
    text = versions.wrong_file("megatron", "/opt/megatron-lm/megatron.py", distribution)
    assert "another copy hides it" in text and "/opt/megatron-lm" in text and "PYTHONPATH" in text
