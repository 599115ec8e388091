"""Every reach of compress/ into the insides of transformers and kvpress, with what it takes for granted.

Their public interfaces end before these places. Each function says what it reaches and why; what it needs is asserted when
this module is imported (transformers) or when kvpress is first used, so that another version fails there with a clear
error, and not in the middle of a forward pass. Checked against transformers 4.57.6 and 5.2.0, and kvpress 0.5.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AutoTokenizer, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.llama import modeling_llama as llama

CHECKED = {"transformers": ("4.57.6", "5.2.0"), "kvpress": ("0.5.5",)}
"""Versions that the tests run with."""


class Incompatible(ImportError, ValueError):
    """Another package's version lacks what this project reaches into."""


def require(package: str, found: str, needed: dict[str, bool]) -> None:
    """Refuse a version of another package that is not as this module takes for granted.

    Args:
        found: its version; needed: what is needed, in words, and whether it is there.

    Raises:
        Incompatible: names what is missing, and the versions to install.
    """
    if missing := [what for what, there in needed.items() if not there]:
        raise Incompatible(
            f"{package} {found}: kvcat_nemo.compress needs {', '.join(missing)}, which this version lacks; install one"
            f" that was checked: {package}=={f' or {package}=='.join(CHECKED[package])}"
        )


def _names(function: Any) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


require(
    "transformers",
    transformers.__version__,
    {
        "AttentionInterface.register": callable(getattr(AttentionInterface, "register", None)),
        "PretrainedConfig._attn_implementation": hasattr(PretrainedConfig, "_attn_implementation"),
        "DynamicCache.layers": hasattr(DynamicCache(), "layers"),
        "attention functions that are given (module, query, key, value, attention_mask)": _names(
            llama.eager_attention_forward
        )[:5]
        == ("module", "query", "key", "value", "attention_mask"),
        "LlamaRotaryEmbedding.forward(x, position_ids)": _names(
            getattr(llama.LlamaRotaryEmbedding.forward, "__wrapped__", llama.LlamaRotaryEmbedding.forward)
        )[1:3]
        == ("x", "position_ids"),
    },
)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model's attention by its name of transformers' registry, while the context lasts.

    Reaches config._attn_implementation: `set_attn_implementation` would look for a kernel of that name, and says nothing of
    what was set before.
    """
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Each layer's attention, of Llama- and Qwen-style models: model.model.layers[i].self_attn."""
    return [layer.self_attn for layer in model.model.layers]


def rope_type(model: PreTrainedModel) -> str:
    """The kind of rotary embedding, as the module holds it: the configuration names it differently in 4.57 and 5."""
    return getattr(getattr(model.model, "rotary_emb", None), "rope_type", "default")


def rope_frequencies(model: PreTrainedModel) -> tuple[Tensor, float]:
    """Rotary frequencies for short texts (some kinds change them with the length), and the factor of their cosines."""
    rotary = model.model.rotary_emb
    original = getattr(rotary, "original_inv_freq", None)
    return (
        rotary.inv_freq if original is None else original,
        float(getattr(rotary, "attention_scaling", 1.0)),
    )


def cached(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, S, D] of a layer of transformers' cache."""
    return cache.layers[layer].keys, cache.layers[layer].values


def kvpress() -> ModuleType:
    """The library.

    Raises:
        ValueError: it is missing, or it lacks what is reached here.
    """
    try:
        import kvpress as library
        import kvpress.presses.kvzip_press as kvzip
    except ImportError as error:
        raise ValueError(
            "kvpress is missing: pip install 'kvcat-nemo[kvpress]', in an environment without NeMo (it needs numpy 2)"
        ) from error
    kinds = ("BasePress", "ScorerPress", "ObservedAttentionPress", "DecodingPress", "PrefillDecodingPress")
    kinds += ("ComposedPress", "FinchPress", "AdaKVPress", "CriticalAdaKVPress", "KVzipPress")
    kinds += ("FastKVzipPress", "KeyRerotationPress")
    needed = {f"kvpress.{name}": hasattr(library, name) for name in kinds}
    needed["kvpress.presses.kvzip_press.AutoTokenizer"] = hasattr(kvzip, "AutoTokenizer")
    require("kvpress", version("kvpress"), needed)
    return library


@contextmanager
def left_as_found(model: PreTrainedModel) -> Iterator[list[nn.Module]]:
    """The attention modules under a press of kvpress, which leaves a rotary embedding and masks on them, and a forward.

    Reaches masked_key_indices, kvpress' own attribute for slots that are stored but hidden ((rows, heads, slots), or None),
    and the modules' dictionaries, to take away what was not there before.
    """
    modules = attention_modules(model)
    had = ["rotary_emb" in module._modules for module in modules]
    forward = "forward" in model.model.__dict__
    try:
        for module in modules:
            module.masked_key_indices = None
        yield modules
    finally:
        for module, rotary in zip(modules, had, strict=True):
            module.__dict__.pop("masked_key_indices", None)
            if not rotary:
                module._modules.pop("rotary_emb", None)
        if not forward:
            model.model.__dict__.pop("forward", None)


def hidden_slots(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """KV heads and slots that a press left stored but hidden from attention, in a cache of one row; None: none."""
    indices = module.masked_key_indices
    return None if indices is None else (indices[1], indices[2])


@contextmanager
def kvzip_tokenizer(tokenizer: Any) -> Iterator[None]:
    """KVzip's tokenizer, which it loads by the model's name: replaces the class in kvpress.presses.kvzip_press."""
    import kvpress.presses.kvzip_press as kvzip

    try:
        kvzip.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
        yield
    finally:
        kvzip.AutoTokenizer = AutoTokenizer
