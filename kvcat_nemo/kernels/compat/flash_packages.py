"""Which flash-attn packages are installed, and whether their functions take what kernels/fused/flash.py gives them."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys

from kvcat_nemo.kernels.compat.torch_operators import overload_of, schema_of

_BOTH_WAYS = {"q", "k", "v", "softmax_scale", "window_size_left", "window_size_right", "softcap"}
_GRADIENTS = {"dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic"}
_PACKED = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
_NO_DROPOUT = {"dropout_p", "causal", "alibi_slopes"}
CALLS = {
    2: {
        "_flash_attn_forward": _BOTH_WAYS | _NO_DROPOUT | {"return_softmax"},
        "_flash_attn_varlen_forward": _BOTH_WAYS | _NO_DROPOUT | _PACKED | {"return_softmax"},
        "_flash_attn_backward": _BOTH_WAYS | _NO_DROPOUT | _GRADIENTS | {"rng_state"},
        "_flash_attn_varlen_backward": _BOTH_WAYS | _NO_DROPOUT | _GRADIENTS | _PACKED | {"rng_state"},
    },
    3: {
        "_flash_attn_forward": _BOTH_WAYS | _PACKED | {"causal"},
        "_flash_attn_backward": _BOTH_WAYS | _GRADIENTS | _PACKED | {"is_causal"},
    },
}
"""Generation → function → arguments that FlashKernel gives it; those of packed documents are optional in generation 3."""


def _installed(distribution: str) -> tuple[int, ...] | None:
    try:
        text = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    digits = [part for part in text.split("+")[0].split(".")[:2] if part.isdigit()]
    return tuple(map(int, digits))


def arguments(function) -> tuple[set[str], set[str]] | None:
    """(all arguments, those without a default) of a function or of a torch.library operator; None: it takes anything."""
    operator = overload_of(function)
    if operator is not None:
        known = schema_of(operator).arguments
        return {x.name for x in known}, {x.name for x in known if not x.has_default_value()}
    known = inspect.signature(function).parameters.values()
    if any(x.kind is x.VAR_KEYWORD for x in known):
        return None
    return {x.name for x in known}, {x.name for x in known if x.default is x.empty}


def _unfit(module, generation: int) -> str:
    """The first function that cannot be called as FlashKernel calls it, and why; empty: all can."""
    for name, given in CALLS[generation].items():
        if not hasattr(module, name):
            return f"it has no {name}"
        known = arguments(getattr(module, name))
        if known is None:
            continue
        always = given if generation == 2 else given - _PACKED
        if given - known[0]:
            return f"{name} does not take {', '.join(sorted(given - known[0]))}"
        if known[1] - always:
            return f"{name} wants {', '.join(sorted(known[1] - always))}"
    return ""


def _one_of(modules: list[str]):
    """The first of the modules that is there; one that is loaded already comes first, since a second copy of an operator
    would replace it."""
    loaded = [name for name in modules if name in sys.modules]
    *others, last = loaded or modules
    for name in others:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.split(".")[0] and error.name != name:
                raise
    return importlib.import_module(last)


@functools.cache
def functions(generation: int):
    """The module that holds the functions of FlashAttention-2 or -3.

    Raises:
        ValueError: when the package is missing or has another interface.
    """
    distribution, wanted, modules = {
        2: ("flash-attn", "2.7 or 2.8", ["flash_attn.flash_attn_interface"]),
        # The second is where Transformer Engine up to 2.14 tells users to copy the first.
        3: ("flash-attn-3", "3.0.0", ["flash_attn_interface", "flash_attn_3.flash_attn_interface"]),
    }[generation]
    version = _installed(distribution)
    if version is None:
        fix = "pip install flash-attn" if generation == 2 else "install it from flash-attention/hopper"
        if generation == 2 and _installed("flash-attn-3") is not None:
            fix += " (flash-attn-3 serves Hopper alone, from 3.0.0 on, not its betas)"
        raise ValueError(
            f"attention_backend=flash: {distribution} is not installed; {fix}, or use attention_backend=torch"
        )
    if generation == 2 and not (2, 7) <= version < (3, 0):
        why = f"it is version {'.'.join(map(str, version))}"
    else:
        found = _one_of(modules)
        why = _unfit(found, generation)
        if not why:
            return found
    raise ValueError(
        f"attention_backend=flash: {distribution} has another interface ({why}); install {wanted}, or use attention_backend=torch"
    )


def function(generation: int, way: str, packed: bool):
    """The function of that generation for `forward` or `backward`; packed: of documents laid end to end.

    Raises:
        ValueError: as `functions`.
    """
    varlen = "varlen_" if packed and generation == 2 else ""  # generation 3 has one for both
    return getattr(functions(generation), f"_flash_attn_{varlen}{way}")


def available(generation: int) -> bool:
    """Whether that generation is installed with the interface we know."""
    try:
        functions(generation)
    except (ValueError, ImportError):
        return False
    return True
