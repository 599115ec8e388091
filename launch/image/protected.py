"""Which of a base image's packages are compiled against its CUDA and torch, and in which version: the ones that import finds.

`python protected.py` prints NAME==VERSION lines. Where a system's package lies under a virtual environment's there are two
metadata folders of one name; only the first on sys.path is what runs, and what pip replaces.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import sys

# Compiled against each other. megatron-core and nemo-toolkit are not: the pinned ones replace the base's.
PROTECTED = re.compile(
    "torch|torchvision|torchaudio|triton|pytorch-triton|transformer-engine(-.*)?|apex|flash-attn(-.*)?|grouped-gemm|"
    "causal-conv1d|mamba-ssm|nvidia-.*-cu1[0-9]"
)


def normal(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(path: list[str] | None = None) -> dict[str, metadata.Distribution]:
    """Normalised name → the distribution that is imported: of several of one name the first on the path."""
    found: dict[str, metadata.Distribution] = {}
    for one in metadata.distributions(path=sys.path if path is None else path):
        name = one.metadata["Name"]
        if name:
            found.setdefault(normal(name), one)
    return found


def protected(path: list[str] | None = None) -> list[str]:
    """Lines NAME==VERSION, sorted."""
    return sorted(
        f"{name}=={one.version}" for name, one in installed(path).items() if PROTECTED.fullmatch(name)
    )


if __name__ == "__main__":
    print(*protected(), sep="\n")
