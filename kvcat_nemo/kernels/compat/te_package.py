"""The parts of Transformer Engine that kernels/fused/te.py calls, and which versions of it were looked at."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
from typing import Any

OLDEST, NEWEST = (2, 9), (2, 20)
"""Minor versions whose sources and Python layers this was held against (tests/kernels/te_versions.py)."""


def version() -> tuple[int, int]:
    """Major and minor version of the installed Transformer Engine.

    Raises:
        ValueError: when it is missing.
    """
    try:
        text = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "attention_backend=te: Transformer Engine is not installed; pip install 'kvcat-nemo[te]' or use auto"
        ) from None
    major, minor = re.match(r"(\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


@functools.cache
def engine():
    """(fused_attn module, selection module, constants) of the installed Transformer Engine.

    Raises:
        ValueError: when it is missing, of another version, or cannot be loaded.
    """
    installed = version()
    if not OLDEST <= installed <= NEWEST:
        found, oldest, newest = (".".join(map(str, x)) for x in (installed, OLDEST, NEWEST))
        raise ValueError(
            f"attention_backend=te: Transformer Engine {found} is not supported; install {oldest} to {newest}, or use flash or torch"
        )
    try:
        from transformer_engine.pytorch import constants
        from transformer_engine.pytorch.attention.dot_product_attention import utils
        from transformer_engine.pytorch.cpp_extensions import fused_attn
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            f"attention_backend=te: Transformer Engine cannot be loaded ({error}); install it whole, with its PyTorch extension: "
            "pip install --no-build-isolation 'transformer-engine[pytorch]'"
        ) from error
    return fused_attn, utils, constants


@functools.cache
def parameters(function) -> frozenset[str]:
    """Names of a function's parameters."""
    return frozenset(inspect.signature(function).parameters)


def call(function, required: dict[str, Any], optional: dict[str, Any]):
    """Call by name; of the optional ones those which this version knows."""
    known = {name: value for name, value in optional.items() if name in parameters(function)}
    return function(**required, **known)
