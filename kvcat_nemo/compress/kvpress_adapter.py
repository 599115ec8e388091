"""kvpress' presses as compressors: any of them by its class name, the usual ones by their own.

A press reads the context once more, through transformers' cache and kvpress' hooks, just as it would by hand; then
what it kept is taken over into our cache: truly shorter heads where kvpress only masks slots (AdaKV, KVzip), slots in
text order, positions of the full text. Read before comparing:

- kvpress counts what is *removed* and rounds the slots down (0.9 of 768 leaves 76); the ratio given to it here is the
  one that leaves the slots wanted. Presses that think in chunks or per layer may leave fewer or more: a warning says
  so, and the cache tells the slots there are.
- SnapKV and its kin keep a window of the last tokens (64), which swallows a budget of that size or less, sinks and
  all: a warning; give a smaller window_size.
- H2O is kvpress' ObservedAttention: attention averaged over the queries that see a slot, no window of recent slots.
- KVzip and KVgrad share their budget over all layers, and take for granted that the context starts as the model's
  chat template does, leaving those tokens unscored; where it does not, they are given no template.
- All of them read the context alone: no press here is aware of a question.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from kvcat_nemo.compress import compat
from kvcat_nemo.compress.cache import KVCache
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.kvpress_run import run_press, taken_over
from kvcat_nemo.compress.prefill import Prefilled

PRESSES = {
    "h2o": ("ObservedAttentionPress", {}),
    "snapkv": ("SnapKVPress", {}),
    "streaming-llm": ("StreamingLLMPress", {}),
    "expected-attention": ("ExpectedAttentionPress", {}),
    "tova": ("TOVAPress", {}),
    "knorm": ("KnormPress", {}),
    "keydiff": ("KeyDiffPress", {}),
    "pyramidkv": ("PyramidKVPress", {}),
    "kvzip": ("KVzipPress", {}),
    "adakv": ("AdaKVPress", {"press": "SnapKVPress"}),
}
"""Names of our own → kvpress' class, and the settings that it does not have by itself."""
_INNER = ("press", "base_press")
_SEED = 0
"""Of presses that draw random sketches."""


def named_press(name: str, settings: dict[str, Any]) -> KVPress:
    """The press behind a name of PRESSES, or behind `kvpress.CLASS`.

    Raises:
        ValueError: see KVPress.
    """
    press, defaults = PRESSES.get(name) or (name.removeprefix("kvpress."), {})
    return KVPress(press, {**defaults, **settings})


@dataclass
class KVPress(Compressor):
    """A press of kvpress.

    Raises:
        ValueError: when kvpress is missing, on an unknown press or argument, and for presses that cannot compress a
            context to a given budget (those for decoding, those whose budget is a threshold or a list).
    """

    press: str = "SnapKVPress"
    """Its class in kvpress."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What to construct it with. `press=NAME` is a press inside it, which takes the arguments that it has alone."""

    name: ClassVar[str] = "kvpress"

    def __post_init__(self):
        self.build()

    @property
    def settings(self) -> dict[str, Any]:
        return {"press": f"kvpress.{self.press}", **self.arguments}

    def __str__(self) -> str:
        for name, (press, defaults) in PRESSES.items():
            if press == self.press:
                own = {key: value for key, value in self.arguments.items() if defaults.get(key) != value}
                return ":".join([name, *(f"{key}={value}" for key, value in own.items())])
        return ":".join([f"kvpress.{self.press}", *(f"{k}={v}" for k, v in self.arguments.items())])

    @cached_property
    def needs_eager(self) -> bool:
        """Whether it looks at the attention weights, which transformers forms in its eager attention alone."""
        return any(type(part).__name__ == "ObservedAttentionPress" for part in _parts(self._again()))

    def build(self):
        """A new press of kvpress; its compression_ratio is still to be set."""
        library = compat.kvpress()
        press = _construct(library, self.press, dict(self.arguments), str_of=f"kvpress.{self.press}")
        parts = list(_parts(press))
        decoding = (library.DecodingPress, library.PrefillDecodingPress)
        if any(isinstance(part, decoding) for part in parts):
            raise ValueError(f"kvpress.{self.press} compresses while text is generated, not a context")
        if isinstance(press, library.ComposedPress) or not _takes_ratio(press):
            raise ValueError(
                f"kvpress.{self.press} cannot be given a budget (its compression_ratio follows from other settings)"
            )
        if isinstance(press, library.FinchPress):
            raise ValueError(
                "kvpress.FinchPress needs the question behind a delimiter; contexts come alone here"
            )
        fakes = (library.AdaKVPress, library.CriticalAdaKVPress)
        if isinstance(press, fakes) and any(isinstance(p, library.ObservedAttentionPress) for p in parts):
            raise ValueError(
                f"kvpress.{self.press} cannot hold ObservedAttentionPress: it refuses eager attention, which that one"
                " needs; give press=SnapKVPress or press=ExpectedAttentionPress"
            )
        return press

    def _again(self):
        """A new press without the notices that the first one gave."""
        logger = logging.getLogger("kvpress")
        before = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return self.build()
        finally:
            logger.setLevel(before)

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        library = compat.kvpress()
        press = self._again()
        length = prefilled.lengths[0]
        # kvpress keeps int(length · (1 − ratio)) slots, or removes int(all · ratio): the nudge keeps either exact.
        removes = isinstance(press, library.KVzipPress | library.FastKVzipPress)
        press.compression_ratio = 1 - (slots + (-1e-6 if removes else 1e-6)) / length
        window = max((getattr(part, "window_size", 0) or 0 for part in _parts(press)), default=0)
        if window >= slots:
            warnings.warn(
                f"{self}: its window of {window} last tokens takes all of {slots} slots, sinks included; give"
                f" window_size={max(1, slots // 2)} or a larger budget",
                stacklevel=3,
            )
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            kept = run_press(press, prefilled, "eager" if self.needs_eager else "sdpa", str(self))
        layers = [taken_over(full, layer) for full, layer in zip(prefilled.cache.layers, kept, strict=True)]
        # Re-rotated keys stand side by side: the text goes on right behind them.
        moved = any(isinstance(part, library.KeyRerotationPress) for part in _parts(press))
        lengths = torch.full_like(prefilled.cache.lengths_B, kept[0].keys.shape[2]) if moved else None
        cache = KVCache(layers, prefilled.cache.lengths_B if lengths is None else lengths)
        if abs(cache.slots - slots) >= 0.5:
            warnings.warn(
                f"{self}: asked to keep {slots} slots, kept {cache.slots:.1f} (it cannot meet every budget)",
                stacklevel=3,
            )
        cache.facts = {"kvpress": {"version": _version(), "compression_ratio": press.compression_ratio}}
        return cache


def _version() -> str:
    from importlib.metadata import version

    return version("kvpress")


def _class(library, name: str, where: str):
    kind = getattr(library, name, None)
    if not (isinstance(kind, type) and issubclass(kind, library.BasePress)):
        known = sorted(
            x for x in dir(library) if x.endswith("Press") and x not in ("BasePress", "ScorerPress")
        )
        raise ValueError(f"{where}: kvpress has no {name}; it has {', '.join(known)}")
    if kind in (library.BasePress, library.ScorerPress):
        raise ValueError(f"{where}: {name} is what presses are made from, not one itself")
    return kind


def _construct(library, name: str, arguments: dict[str, Any], str_of: str):
    """A press from its class name; what it does not know goes to the press inside it."""
    kind = _class(library, name, str_of)
    known = {f.name for f in dataclasses.fields(kind) if f.init} - {"compression_ratio"}
    inner = next((key for key in _INNER if key in known), None)
    own = {key: value for key, value in arguments.items() if key in known and key != inner}
    rest = {key: value for key, value in arguments.items() if key not in own and key != inner}
    if inner:
        if inner not in arguments:
            raise ValueError(
                f"{str_of}: {name} works on another press; give {inner}=SnapKVPress, for instance"
            )
        own[inner] = _construct(library, str(arguments[inner]), rest, str_of)
    elif rest:
        has = ", ".join(sorted(f"{key}=…" for key in known)) or "none"
        raise ValueError(f"{str_of}: {', '.join(rest)} is not a setting of {name}; it has {has}")
    try:
        return kind(**own)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{str_of}: {name} refused its settings: {error}") from error


def _parts(press):
    """A press and those inside it."""
    yield press
    for key in ("prefilling_press", "decoding_press", *_INNER):
        part = getattr(press, key, None)
        if part is not None:
            yield from _parts(part)


def _takes_ratio(press) -> bool:
    try:
        press.compression_ratio = 0.0
    except (AttributeError, TypeError):
        return False
    return hasattr(press, "compression_ratio")
