"""Megatron → Hugging Face: finds the model among whatever else a checkpoint holds, and streams it out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from kvcat_nemo.conversion.arch import Architecture, from_hf_config
from kvcat_nemo.conversion.dist_checkpoint import CheckpointReader
from kvcat_nemo.conversion.folders import (
    check_base,
    check_out,
    copy_sidecars,
    find_base,
    hf_side,
    published,
    require_space,
)
from kvcat_nemo.conversion.importing import DTYPES
from kvcat_nemo.conversion.safetensors_io import SafetensorsWriter, find_not_finite
from kvcat_nemo.conversion.weight_map import Weight, from_groups, hf_shapes, instances, weight_map
from kvcat_nemo.models.function import differences, function_of_model, stored_function
from kvcat_nemo.models.hf_config import read_config, read_model
from kvcat_nemo.models.hub import model_folder
from kvcat_nemo.models.rope import with_both_forms
from kvcat_nemo.runs.checkpoints import find_checkpoint
from kvcat_nemo.runs.vocabulary import check_cut, recorded

_ANCHOR = "embedding.word_embeddings.weight"
# A bare optimizer key, or one of several chained optimizers.
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


def is_router_key(key: str) -> bool:
    """Whether a key, without the model's prefix, belongs to a KV-CAT router; these are no part of the plain model."""
    return ".router." in f".{key}" or key.startswith("decoder.routers")


def model_prefix(reader: CheckpointReader) -> str:
    """What stands before the model's keys, e.g. "" or "module.".

    Raises:
        ValueError: when there is no embedding at all, or there are several different models.
    """
    found = [
        key.removesuffix(_ANCHOR)
        for key in reader.shapes
        if key.endswith(_ANCHOR) and not _OPTIMIZER.match(key)
    ]
    # Imported checkpoints list the same bytes under several prefixes: that is one model, not several.
    places = {reader.location(prefix + _ANCHOR) for prefix in found}
    if not found:
        raise ValueError(f"{reader.folder} holds no GPT model: no key ends in {_ANCHOR}")
    if len(places) > 1:
        raise ValueError(f"{reader.folder} holds several models, under {sorted(found)}; export needs one")
    return min(found, key=len)


@dataclass(frozen=True)
class MegatronModel:
    """One plain model inside a distributed checkpoint, readable as Hugging Face tensors.

    `open` checks the whole checkpoint, so that reading afterwards cannot find a tensor missing.
    """

    reader: CheckpointReader
    arch: Architecture
    prefix: str

    @classmethod
    def open(cls, weights: Path, arch: Architecture, *, vocabulary: int | None = None) -> MegatronModel:
        """
        Args:
            vocabulary: tokens that the checkpoint was saved with (kvcat_nemo.runs.vocabulary), None when nothing tells.

        Raises:
            ValueError: for missing, misshapen or unknown model tensors; routers and optimizer state are passed over.
        """
        reader = CheckpointReader(weights)
        model = cls(reader, arch, model_prefix(reader))
        known = set()
        for weight, layer in instances(arch):
            key, _ = model._locate(weight, layer)
            known.add(key)
            model._check_shape(weight, key)
            model._check_padding(weight, key, vocabulary)
        for key in reader.shapes:
            if key in known or _OPTIMIZER.match(key) or not key.startswith(model.prefix):
                continue
            bare = key.removeprefix(model.prefix)
            alias = any(key.endswith(k) and reader.location(key) == reader.location(k) for k in known)
            if not (alias or is_router_key(bare) or bare.endswith("_extra_state")):
                raise ValueError(
                    f"{weights} has the tensor {key}, which a plain {arch.family} model does not have"
                    + (
                        "; is tie_word_embeddings right in the base's config.json?"
                        if "output_layer" in key
                        else ""
                    )
                )
        return model

    def _locate(self, weight: Weight, layer: int) -> tuple[str, tuple[int, ...]]:
        """Key and leading offset. Layers are stacked under one key, unless they differ from one another."""
        stacked = self.prefix + weight.megatron
        if not weight.layered:
            candidates = {stacked: ()}
        else:
            single = self.prefix + weight.megatron.replace("layers.", f"layers.{layer}.", 1)
            candidates = {stacked: (layer,), single: ()}
        for key, lead in candidates.items():
            if key in self.reader.shapes:
                return key, lead
        hint = "; is tie_word_embeddings right in the base's config.json?" if "output" in stacked else ""
        raise ValueError(f"{self.reader.folder} lacks {' and '.join(candidates)}{hint}")

    def _check_shape(self, weight: Weight, key: str) -> None:
        stored, shape = self.reader.shapes[key], weight.shape(self.arch)
        if len(stored) > len(shape):
            shape = (self.arch.num_layers, *shape)
        rows_padded = weight.padded and len(stored) == len(shape) and stored[0] >= shape[0]
        if stored[1:] != shape[1:] or (stored[:1] != shape[:1] and not rows_padded):
            raise ValueError(
                f"{self.reader.folder}: {key} has shape {list(stored)}, the base's config.json asks for {list(shape)}"
            )

    def _check_padding(self, weight: Weight, key: str, vocabulary: int | None) -> None:
        rows, wanted = self.reader.shapes[key][0], self.arch.vocab_size
        if not weight.padded or (vocabulary is None and rows == wanted):
            return
        width = self.reader.shapes[key][1]
        note = check_cut(
            vocab_size=wanted,
            rows=rows,
            known=vocabulary,
            tensor_parallel=self.reader.row_parts(key),
            zero=vocabulary is None and not self.reader.read(key, (wanted, 0), (rows - wanted, width)).any(),
            where=self.reader.folder,
        )
        if note:
            print(note, file=sys.stderr)

    def dtype(self, weight: Weight) -> torch.dtype:
        return self.reader.dtypes[self._locate(weight, 0)[0]]

    def read(self, weight: Weight, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of one weight in one layer, one at a time, without vocabulary padding."""
        key, lead = self._locate(weight, layer)

        def rows(first: int, shape: tuple[int, ...]) -> torch.Tensor:
            offsets = (*lead, first, *(0 for _ in shape[1:]))
            return self.reader.read(key, offsets, (*(1 for _ in lead), *shape)).view(shape)

        names = weight.hf_names(layer)
        if weight.layout == "groups":
            yield from zip(names, from_groups(rows(0, weight.shape(self.arch)), self.arch), strict=True)
            return
        first = 0
        for name, shape in zip(names, weight.hf_shapes(self.arch), strict=True):
            yield name, rows(first, shape)
            first += shape[0]


def trained_differences(weights: Path, folder: Path) -> list[str]:
    """In what the function of a checkpoint's weights, as recorded, differs from a Hugging Face folder's config.json."""
    stored = stored_function(weights)
    if stored is None:
        return []
    function, file = stored
    wanted = function_of_model(read_model(folder))
    return [
        f"{name} is {trained!r} in {file} and {said!r} in {folder / 'config.json'}"
        for name, (trained, said) in differences(function, wanted).items()
    ]


def check_trained(weights: Path, base: Path) -> None:
    """Refuse a base whose config.json is not that of the trained model.

    Raises:
        ValueError: names the first value that differs, both readings and the fix.
    """
    if stored_function(weights) is None:
        print(
            f"note: nothing records the function that {weights} was trained in; {base / 'config.json'} is taken at its word",
            file=sys.stderr,
        )
    for difference in trained_differences(weights, base):
        raise ValueError(
            f"{weights}: {difference}: exported with this base, it would be another model than the trained one; give the "
            "model that the run started from with --base, or a copy of it whose config.json says what was trained"
        )


def export_hf(
    checkpoint: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    max_shard_size: int = 5 * 10**9,
    dtype: str = "keep",
    force: bool = False,
    unverified: bool = False,
) -> Path:
    """Write the plain Hugging Face model of a Megatron distributed checkpoint.

    Args:
        checkpoint: an imported folder, a NeMo checkpoint, a run folder (its newest finished checkpoint is taken)
            or a bare distributed checkpoint.
        base: where config and tokenizer come from (an imported or a Hugging Face folder, or a hub id); found by itself when
            the checkpoint holds hf/ or a kvcat_base.json.
        max_shard_size: bytes.
        dtype: "keep", "float32" or "bfloat16".
        unverified: take a checkpoint or base without a manifest, of which nothing tells whether its files are whole.

    Raises:
        ValueError: when the checkpoint is not whole (kvcat_nemo.runs), not exactly one model of the base's architecture, was
            trained as another function than the base's config.json describes, or holds NaN.
    """
    found = find_checkpoint(checkpoint, unverified=unverified)
    weights = found.weights
    base = hf_side(model_folder(base, weights=False, what="base")) if base else find_base(weights)
    check_out(out, force=force, sources=[checkpoint, found.folder, base])
    found.require_whole()
    check_base(base, unverified=unverified)
    config = read_config(base)
    arch = from_hf_config(config)
    model = MegatronModel.open(weights, arch, vocabulary=recorded(found))
    check_trained(weights, base)
    target = DTYPES[dtype]
    dtypes = {
        name: target or model.dtype(weight)
        for weight, layer in instances(arch)
        for name in weight.hf_names(layer)
    }
    tensors = {name: (shape, dtypes[name]) for name, shape in hf_shapes(arch).items()}
    with published(out, force=force, sources=[checkpoint, found.folder, base], kind="export") as partial:
        require_space(partial, sum(_nbytes(shape, kind) for shape, kind in tensors.values()))
        copy_sidecars(base, partial)
        kept = max({dtypes[n] for w in weight_map(arch) for n in w.hf_names(0)}, key=lambda d: d.itemsize)
        # transformers 4.56 renamed torch_dtype to dtype; whichever the base has is kept up to date.
        for field in [name for name in ("torch_dtype", "dtype") if name in config] or ["torch_dtype"]:
            config[field] = str(kept).removeprefix("torch.")
        config = with_both_forms(config)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        writer = SafetensorsWriter(partial, tensors, max_shard_size)
        for weight, layer in tqdm(list(instances(arch)), desc="Megatron → HF", unit="tensor", disable=None):
            for name, tensor in model.read(weight, layer):
                tensor = tensor if target is None else tensor.to(target)
                kind = find_not_finite(tensor)
                if kind:
                    raise ValueError(f"{weights}: {name} holds {kind}; the checkpoint is not usable")
                writer.write(name, tensor)
                del tensor
        writer.close()
    return Path(out)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
