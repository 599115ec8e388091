"""An adapter folder: the scorer and the LoRA matrices of KV-Distill, in PEFT's layout where PEFT has one.

adapter_model.safetensors
    `base_model.model.model.layers.<i>.self_attn.<q|k|v|o>_proj.lora_<A|B>.weight`, PEFT's names (Q and O of the last layer are
    missing: nothing reads what they change), and `scorer.up.weight`, `scorer.up.bias`, `scorer.down.weight`, `scorer.down.bias`
adapter_config.json
    PEFT's fields (peft_type, r, lora_alpha, use_rslora, target_modules, base_model_name_or_path) and, under `kvcat`, the
    method's settings, the shape of the base and the fingerprint of its files

PEFT itself can load the matrices, but applies them to every token. KV-Distill needs them on some rows alone, so the model of a
plain PEFT load is not the one that was trained.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcat_nemo.common.folders import new_folder
from kvcat_nemo.method.kvdistill import KVDistillConfig

WEIGHTS, CARD = "adapter_model.safetensors", "adapter_config.json"
FORMAT = 1
PROJECTIONS = ("q", "k", "v", "o")
SCORER = ("up.weight", "up.bias", "down.weight", "down.bias")
SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


@dataclass
class Adapter:
    """Scorer and adapters of one base model; matrices on the CPU."""

    config: KVDistillConfig
    shape: dict[str, int]
    """The base's sizes, by the names of SHAPE."""
    lora: dict[tuple[int, str], tuple[Tensor, Tensor]]
    """(layer, projection) → A [r, in] and B [out, r]."""
    scorer: dict[str, Tensor]
    """By the names of SCORER."""
    base_fingerprint: str | None = None
    """Of the base's weight files; None where it is not known."""
    base_name: str = ""
    path: str = field(default="", compare=False)
    """Where it was loaded from, for messages."""


def expected_shapes(config: KVDistillConfig, shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Tensor names of the file → their shapes."""
    M, H, G, D = (shape[name] for name in SHAPE[1:])
    r, width = config.lora_rank, config.scorer_width or M
    sizes = {"q": (M, H * D), "k": (M, G * D), "v": (M, G * D), "o": (H * D, M)}
    out = {"scorer.up.weight": (width, M), "scorer.up.bias": (width,)}
    out |= {"scorer.down.weight": (1, width), "scorer.down.bias": (1,)}
    for layer, projection in adapted(shape["num_hidden_layers"]):
        inner, outer = sizes[projection]
        name = _tensor_name(layer, projection)
        out |= {f"{name}.lora_A.weight": (r, inner), f"{name}.lora_B.weight": (outer, r)}
    return out


def adapted(num_layers: int) -> list[tuple[int, str]]:
    """(layer, projection) of every adapter: Q and O of the last layer change nothing that an answer reads."""
    return [(i, p) for i in range(num_layers) for p in PROJECTIONS if i < num_layers - 1 or p in "kv"]


def save_adapter(adapter: Adapter, folder: str | Path, *, replace: bool = False) -> None:
    """Write an adapter folder, whole or not at all.

    Raises:
        ValueError: when a tensor is missing, of another shape or not finite, or the folder is there (and not an adapter's).
    """
    tensors = {f"scorer.{name}": x for name, x in adapter.scorer.items()}
    for (layer, projection), (a, b) in adapter.lora.items():
        name = _tensor_name(layer, projection)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    _check_tensors(str(folder), tensors, expected_shapes(adapter.config, adapter.shape))
    card = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "r": adapter.config.lora_rank,
        "lora_alpha": adapter.config.lora_alpha,
        "use_rslora": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{p}_proj" for p in PROJECTIONS],
        "kvcat": {
            "format": FORMAT,
            "method": "kv-distill",
            "settings": asdict(adapter.config),
            "shape": adapter.shape,
            "base_fingerprint": adapter.base_fingerprint,
        },
    }
    with new_folder(folder, own_names if replace else None) as temporary:
        save_file({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, temporary / WEIGHTS)
        (temporary / CARD).write_text(json.dumps(card, indent=2) + "\n")


def load_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    folder = Path(folder)
    card = _read_card(folder)
    ours = card["kvcat"]
    path = folder / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy or export the adapter again") from None
    config = _settings(folder, ours)
    shape = ours["shape"]
    _check_tensors(str(path), tensors, expected_shapes(config, shape))
    lora = {
        key: tuple(tensors[f"{_tensor_name(*key)}.lora_{x}.weight"] for x in "AB")
        for key in adapted(shape["num_hidden_layers"])
    }
    return Adapter(
        config,
        shape,
        lora,
        {name: tensors[f"scorer.{name}"] for name in SCORER},
        ours.get("base_fingerprint"),
        str(card.get("base_model_name_or_path") or ""),
        str(folder),
    )


def _tensor_name(layer: int, projection: str) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.{projection}_proj"


def own_names(folder: Path) -> set[str] | None:
    """What an export wrote into a folder (common.folders.new_folder); None where it is no adapter of ours."""
    try:
        _read_card(folder)
    except ValueError:
        return None
    return {WEIGHTS, CARD}


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    try:
        card = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"adapter={folder}: no {CARD} in it; give the folder that the export wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy or export the adapter again") from None
    ours = card.get("kvcat") if isinstance(card, dict) else None
    if not isinstance(ours, dict) or ours.get("method") != "kv-distill":
        raise ValueError(f"{path}: no adapter of KV-Distill (kvcat.method); a plain LoRA has no scorer")
    if ours.get("format") != FORMAT:
        raise ValueError(
            f"{path}: kvcat.format={ours.get('format')!r}: this version reads {FORMAT}; use the version that wrote it"
        )
    shape = ours.get("shape")
    good = isinstance(shape, dict) and all(
        type(shape.get(name)) is int and 0 < shape[name] < 2**20 for name in SHAPE
    )
    if not good:
        raise ValueError(f"{path}: kvcat.shape={shape!r}: needs {', '.join(SHAPE)} as whole numbers above 0")
    return card


def _settings(folder: Path, ours: dict[str, Any]) -> KVDistillConfig:
    given = ours.get("settings")
    known = {x.name for x in fields(KVDistillConfig)}
    if not isinstance(given, dict) or set(given) - known:
        raise ValueError(
            f"{folder / CARD}: kvcat.settings={given!r}: not settings of KV-Distill as this version knows them"
        )
    try:
        return KVDistillConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CARD}: {error}") from None


def _check_tensors(where: str, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(
            f"{where}: {len(missing)} tensors are missing, {missing[0]} first; export the adapter again"
        )
    if more := sorted(set(tensors) - set(expected)):
        raise ValueError(f"{where}: {len(more)} tensors do not belong to it, {more[0]} first")
    for name, shape in expected.items():
        x = tensors[name]
        if tuple(x.shape) != shape or not x.is_floating_point():
            raise ValueError(
                f"{where}: {name} is {x.dtype} {tuple(x.shape)}, expected numbers of shape {shape}"
            )
        if x.numel() and not math.isfinite(float(x.abs().max())):
            raise ValueError(
                f"{where}: {name} holds numbers that are not finite; the training that wrote it went wrong"
            )


def shape_of(config: Any) -> dict[str, int]:
    """The sizes of SHAPE of a Hugging Face configuration."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {name: int(getattr(config, name)) for name in SHAPE[:-1]} | {"head_dim": int(head_dim)}


def check_base(adapter: Adapter, config: Any, fingerprint: str | None, *, allow_other: bool) -> None:
    """Refuse an adapter that was trained for another model.

    Args:
        config: the model's; fingerprint: of the model's files, None where it is not known.
        allow_other: take a model of the same shape with other weights (a fine-tuned one).

    Raises:
        ValueError: says what differs.
    """
    where = f"adapter={adapter.path}"
    mine = shape_of(config)
    for name in SHAPE:
        if mine[name] != adapter.shape[name]:
            raise ValueError(
                f"{where}: its base has {name}={adapter.shape[name]}, the model {mine[name]}; give the model it was trained for"
            )
    adapter.config.check_layers(mine["num_hidden_layers"])
    known = adapter.base_fingerprint, fingerprint
    if None not in known and known[0] != known[1] and not allow_other:
        raise ValueError(
            f"{where}: trained for {adapter.base_name or 'another model'} ({known[0][:12]}…), not for these weights"
            f" ({known[1][:12]}…); to use it all the same: allow_other_base=true"
        )
