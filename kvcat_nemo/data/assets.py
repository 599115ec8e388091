"""The way to examples/registry_assets: a model, texts and benchmarks out of package registries, for trying things without a hub.

The folder belongs to a clone of the project, not to the package: an installed wheel does not have it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "registry_assets"


def registry_assets(module: str) -> ModuleType:
    """A module of the example folder, such as "corpora".

    Raises:
        ValueError: when this installation has no such folder.
    """
    if not (FOLDER / "__init__.py").is_file():
        raise ValueError(
            "named models, corpora and benchmarks are read by examples/registry_assets, which a clone of kvcat-nemo has and "
            f"an installed package has not (no {FOLDER}); give a hub id or a local file instead, or work in a clone"
        )
    if "registry_assets" not in sys.modules:
        spec = importlib.util.spec_from_file_location("registry_assets", FOLDER / "__init__.py")
        package = importlib.util.module_from_spec(spec)
        sys.modules["registry_assets"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"registry_assets.{module}")
