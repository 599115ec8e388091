"""Is the image whole? Imports what training needs; what a CPU base cannot have is skipped, and said so."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError, version

OF_CUDA = {"transformer_engine.pytorch": "transformer-engine", "apex": "apex"}
NO_DRIVER = ("libcuda", "libnvidia", "No CUDA GPUs", "NVIDIA driver")


def main() -> None:
    import torch

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    for module, package in OF_CUDA.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            if torch.version.cuda:
                sys.exit(
                    f"{package} is missing, though torch is built for CUDA: take a NeMo image as the base"
                )
            print(f"{package}: SKIPPED, a CPU base has none; training uses Megatron's local layers")
            continue
        try:
            importlib.import_module(module)
            print(f"{package} {found}")
        except (ImportError, OSError, RuntimeError) as error:
            if not any(word in str(error) for word in NO_DRIVER):
                raise
            print(f"{package} {found}: there, but its import SKIPPED, as the build has no driver ({error})")

    # First: it switches Megatron to the CPU where there is no GPU.
    recipes = importlib.import_module("kvcat_nemo.recipes").RECIPES
    import megatron.core

    print(f"megatron-core {megatron.core.__version__}, nemo-toolkit {version('nemo-toolkit')}")
    for name, recipe in recipes.items():
        recipe()
        print(f"recipe {name}")


if __name__ == "__main__":
    main()
