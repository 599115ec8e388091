"""Is the image whole? The pinned packages are there, in their versions, and are what import finds; what the base has built for
its CUDA is what it was; every recipe builds. What a CPU base cannot have is skipped, and said so.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import Distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from protected import installed, normal, protected  # noqa: E402

HERE = Path(__file__).resolve().parents[2]
OF_CUDA = {"transformer_engine.pytorch": "transformer-engine", "apex": "apex"}
NO_DRIVER = ("libcuda", "libnvidia", "No CUDA GPUs", "NVIDIA driver")
PINNED = {
    "megatron.core": "megatron-core",
    "nemo": "nemo-toolkit",
    "nemo_run": "nemo-run",
    "lightning": "lightning",
    "modelopt": "nvidia-modelopt",
    "nvidia_resiliency_ext": "nvidia-resiliency-ext",
    "transformers": "transformers",
    "numpy": "numpy",
}
"""Module → package whose version constraints.txt fixes and which the project has been tested with."""


def pins(constraints: Path) -> dict[str, str]:
    """Normalised name → version of a constraints file."""
    lines = [line.strip() for line in constraints.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {normal(name.strip()): version.strip() for name, _, version in pairs}


def wrong_pin(package: str, found: dict[str, Distribution], wanted: dict[str, str]) -> str | None:
    """What is wrong with a pinned package's version, or None."""
    if package not in found:
        return f"{package} is not installed"
    version = found[package].version
    if package in wanted and version != wanted[package]:
        return f"{package} {version} is installed, constraints.txt has {wanted[package]}"
    return None


def wrong_file(module: str, file: str | None, distribution: Distribution) -> str | None:
    """Whether a module comes from another place than its package's metadata; None: it does not."""
    where = Path(str(distribution.locate_file(""))).resolve()
    editable = (distribution.read_text("direct_url.json") or "").find('"editable": true') >= 0
    if editable or file is None:
        return None
    if where not in Path(file).resolve().parents:
        name = distribution.metadata["Name"]
        return (
            f"import {module} finds {file}, but {name} {distribution.version} lies in {where}: another copy hides it; "
            "look at PYTHONPATH and sys.path of the base"
        )
    return None


def main() -> None:
    import torch

    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    found, wanted, wrong = installed(), pins(HERE / "constraints.txt"), []
    kept = Path("/opt/kvcat/protected.txt")
    if kept.is_file() and kept.read_text().split() != protected():
        wrong.append(f"the base's own packages are {protected()}, they were {kept.read_text().split()}")
    for module, package in OF_CUDA.items():
        if package not in found:
            if torch.version.cuda:
                wrong.append(
                    f"{package} is missing, though torch is built for CUDA: take a NeMo image as the base"
                )
            print(f"{package}: SKIPPED, a CPU base has none; training uses Megatron's local layers")
            continue
        try:
            imported = importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            if not any(word in str(error) for word in NO_DRIVER):
                raise
            print(
                f"{package} {found[package].version}: there, but its import SKIPPED, as the build has no driver ({error})"
            )
            continue
        wrong.append(wrong_file(module, imported.__file__, found[package]))
        print(f"{package} {found[package].version} from {imported.__file__}")

    # First: it switches Megatron to the CPU where there is no GPU.
    recipes = importlib.import_module("kvcat_nemo.recipes").RECIPES
    for module, package in PINNED.items():
        problem = wrong_pin(package, found, wanted)
        if problem is None:
            imported = importlib.import_module(module)
            problem = wrong_file(module, imported.__file__, found[package])
            print(f"{package} {found[package].version} from {imported.__file__}")
        wrong.append(problem)
    problems = [problem for problem in wrong if problem]
    if problems:
        sys.exit("image: " + "\nimage: ".join(problems))
    for name, recipe in recipes.items():
        recipe()
        print(f"recipe {name}")


if __name__ == "__main__":
    main()
