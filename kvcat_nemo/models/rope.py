"""Rotary position embedding of a model: which kinds are understood, and how config.json says them (frequencies.py: numbers)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcat_nemo.models.config_values import agreed, number, refuse, whole

DEFAULT_THETA = 10000.0
"""The base where config.json names none: the default of every supported family, in transformers 4 and 5."""

CONFIG_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct")
"""The fields of config.json that describe the rope; `original_max_position_embeddings` may stand beside them."""


@dataclass(frozen=True)
class RopeScaling:
    """How the inverse frequencies are stretched for long contexts."""

    rope_type: str
    """"linear" (all frequencies divided by `factor`), "llama3" (only the low ones) or "yarn" (`YarnScaling`)."""
    factor: float
    """Stretch of the context, > 0."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position / low_freq_factor are stretched fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position / high_freq_factor are left alone."""
    original_max_position: int = 8192
    """llama3 and yarn: context length of the pretraining, tokens."""


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (arXiv 2309.00071): high frequencies stay, low ones are divided, a ramp over the dimensions between."""

    beta_fast: float = 32.0
    """Rotations within the original context above which a dimension is left alone."""
    beta_slow: float = 1.0
    """Rotations within the original context below which a dimension is divided by `factor`."""
    attention_scaling: float = 1.0
    """Multiplies the cosines and the sines."""
    truncate: bool = True
    """Whether the ramp begins and ends at whole dimensions."""


@dataclass(frozen=True)
class Rope:
    """The rope of a model; `scaling` is None for plain frequencies."""

    theta: float
    scaling: RopeScaling | None = None

    @property
    def kind(self) -> str:
        return self.scaling.rope_type if self.scaling else "default"

    @property
    def attention_scaling(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.attention_scaling if isinstance(self.scaling, YarnScaling) else 1.0

    def parameters(self) -> dict[str, Any]:
        """The rope in transformers 5's names (`rope_parameters`), nothing left to a default."""
        out: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        scaling = self.scaling
        if scaling is None:
            return out
        out["factor"] = scaling.factor
        if scaling.rope_type != "linear":
            out["original_max_position_embeddings"] = scaling.original_max_position
        if scaling.rope_type == "llama3":
            out |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        if isinstance(scaling, YarnScaling):
            out |= {
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_scaling,
                "truncate": scaling.truncate,
            }
        return out


def read_rope(config: Mapping[str, Any], where: str = "config.json") -> Rope:
    """The rope of a Hugging Face configuration, in the form of transformers 4, of transformers 5, or both when they agree.

    Raises:
        ValueError: for a kind other than default, linear, llama3 and yarn, for a missing or impossible value, and for
            two fields that say different things: transformers 4 and 5 would then read different models.
    """
    forms = {name: config[name] for name in ("rope_scaling", "rope_parameters") if config.get(name)}
    for name, form in forms.items():
        if not isinstance(form, Mapping):
            refuse(where, name, form, "it must be an object", f"remove {name} for plain rope")
        nested = [key for key, value in form.items() if isinstance(value, Mapping)]
        if nested:
            refuse(
                where,
                f"{name}.{nested[0]}",
                form[nested[0]],
                "a rope per kind of layer is read differently by transformers 4 and 5",
                f"give one rope for all layers, directly in {name}",
            )
    top = {"rope_theta": config.get("rope_theta")}
    for name in ("partial_rotary_factor", "rotary_pct"):
        for place, value in [(name, config.get(name))] + [
            (f"{n}.{name}", f.get(name)) for n, f in forms.items()
        ]:
            if value is not None and (isinstance(value, bool) or value != 1):
                refuse(
                    where,
                    place,
                    value,
                    "models that rotate a part of each head are not supported",
                    "use a model that rotates the whole head (1.0)",
                )
    theta = agreed(
        where,
        {"rope_theta": top["rope_theta"]}
        | {f"{n}.rope_theta": f.get("rope_theta") for n, f in forms.items()},
        "transformers 4 takes the first, transformers 5 the last",
    )
    theta = DEFAULT_THETA if theta is None else number(where, "rope_theta", theta, above=1.0)
    scalings = {name: _scaling(form, name, config, where) for name, form in forms.items()}
    if len(set(scalings.values())) > 1:
        raise ValueError(
            f"{where}: rope_scaling = {dict(forms['rope_scaling'])!r} beside rope_parameters = "
            f"{dict(forms['rope_parameters'])!r}: they describe two different ropes, and transformers 4 takes the first "
            "alone; keep the one that the model was trained with"
        )
    return Rope(theta, next(iter(scalings.values()), None))


def _scaling(form: Mapping, name: str, config: Mapping, where: str) -> RopeScaling | None:
    kinds = {f"{name}.rope_type": form.get("rope_type"), f"{name}.type": form.get("type")}
    kind = agreed(where, kinds, "transformers 4 takes `type`, transformers 5 `rope_type`")
    field = f"{name}.rope_type"
    if kind is None:
        if form.get("factor") is not None:
            refuse(where, f"{name}.factor", form["factor"], "its rope_type is missing", f"add {field}")
        return None
    if kind == "default":
        if form.get("factor") not in (None, 1, 1.0):
            refuse(
                where,
                f"{name}.factor",
                form["factor"],
                "it stands beside rope_type 'default', which has no factor",
                "remove the factor, or name the kind that it belongs to (linear, for instance)",
            )
        return None
    if kind in ("dynamic", "longrope", "su"):
        raise ValueError(
            f"{where}: {field} is {kind!r}: its frequencies change with the length of the text, so keys that are kept in "
            "a cache would belong to another length; supported are default, linear, llama3 and yarn. "
            f"If the model is to be used within its original context only, remove {name} from a copy of the checkpoint"
        )
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"{where}: {field} is {kind!r}; supported are default, linear, llama3 and yarn. "
            f"If the model is to be used within its original context only, remove {name} from a copy of the checkpoint"
        )

    def value(key: str, default: float | None = None) -> float:
        got = form.get(key)
        return default if got is None else number(where, f"{name}.{key}", got, above=0.0)

    needed = ["factor"] + (["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])
    missing = [key for key in needed if form.get(key) is None]
    if missing:
        raise ValueError(f"{where}: {name} of type {kind!r} lacks {', '.join(missing)}; add it")
    factor = value("factor")
    if kind == "linear":
        return RopeScaling(kind, factor)
    lengths = {
        f"{name}.original_max_position_embeddings": form.get("original_max_position_embeddings"),
        "original_max_position_embeddings": config.get("original_max_position_embeddings"),
    }
    length = agreed(where, lengths, "transformers 4 takes the first, transformers 5 the second")
    if length is None and kind == "yarn":
        length = config.get("max_position_embeddings")  # so do transformers 4 and 5
    if length is None:
        raise ValueError(f"{where}: {name} of type {kind!r} lacks original_max_position_embeddings; add it")
    length = whole(where, f"{name}.original_max_position_embeddings", length)
    if kind == "llama3":
        low, high = value("low_freq_factor"), value("high_freq_factor")
        if not low < high:
            refuse(
                where, f"{name}.high_freq_factor", high, f"it must be above low_freq_factor {low}", "mend one"
            )
        return RopeScaling(kind, factor, low, high, length)
    fast, slow = value("beta_fast", 32.0), value("beta_slow", 1.0)
    truncate = form.get("truncate", True)
    if not isinstance(truncate, bool):
        refuse(where, f"{name}.truncate", truncate, "it must be true or false", "mend it")
    if form.get("attention_factor") is not None:
        attention = number(where, f"{name}.attention_factor", form["attention_factor"], above=0.0)
    elif form.get("mscale") and form.get("mscale_all_dim"):
        attention = _mscale(factor, value("mscale")) / _mscale(factor, value("mscale_all_dim"))
    else:
        attention = _mscale(factor, 1.0)
    return YarnScaling(
        kind,
        factor,
        original_max_position=length,
        beta_fast=fast,
        beta_slow=slow,
        attention_scaling=attention,
        truncate=truncate,
    )


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def with_both_forms(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with `rope_parameters` alone, as transformers 5 writes it, with the fields beside it that transformers 4 reads.

    transformers 5 reads the other form by itself, transformers 4 would take theta 10,000 and no scaling.

    Raises:
        ValueError: as `read_rope`.
    """
    if not config.get("rope_parameters"):
        return config
    parameters = read_rope(config).parameters()
    theta = parameters.pop("rope_theta")
    scaling = None if parameters["rope_type"] == "default" else parameters
    return config | {"rope_theta": theta, "rope_scaling": config.get("rope_scaling") or scaling}
