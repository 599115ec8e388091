"""Which Hugging Face tensors make which Megatron tensor: one declarative map, with what an architecture has beside it.

Megatron's names are those of Transformer Engine, which its local layers save under too. Tensors of the layers
are stored stacked: [num_layers, …] under one name. Shapes are written in the symbols of `dimensions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from kvcat_nemo.conversion.arch import Architecture


@dataclass(frozen=True)
class Weight:
    """One Megatron tensor and the Hugging Face tensors in it.

    layout "rows": the parts below one another (for a single part: a copy).
    layout "groups": per KV group its query heads, then its key head, then its value head.
    """

    megatron: str
    hf: Mapping[str, str]
    """Hugging Face name ("{layer}" in it) → shape in symbols."""
    layout: str = "rows"

    @property
    def layered(self) -> bool:
        return self.megatron.startswith("decoder.layers.")

    @property
    def padded(self) -> bool:
        """Whether Megatron may append rows for the tensor parallel size."""
        return next(iter(self.hf.values())).split()[0] == "vocab"

    def hf_names(self, layer: int) -> tuple[str, ...]:
        return tuple(name.format(layer=layer) for name in self.hf)

    def hf_shapes(self, arch: Architecture) -> tuple[tuple[int, ...], ...]:
        size = dimensions(arch)
        return tuple(tuple(size[symbol] for symbol in shape.split()) for shape in self.hf.values())

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """Shape of one layer's tensor, unpadded."""
        shapes = self.hf_shapes(arch)
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def dimensions(arch: Architecture) -> dict[str, int]:
    """Sizes of the symbols that shapes are written in."""
    return {
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "query": arch.num_attention_heads * arch.kv_channels,
        "kv": arch.num_query_groups * arch.kv_channels,
        "head": arch.kv_channels,
        "vocab": arch.vocab_size,
    }


_HF = "model.layers.{layer}."
_ATTENTION = "decoder.layers.self_attention."
_MLP = "decoder.layers.mlp."

_DECODER = (
    Weight("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"}),
    Weight(_ATTENTION + "linear_qkv.layer_norm_weight", {_HF + "input_layernorm.weight": "hidden"}),
    Weight(
        _ATTENTION + "linear_qkv.weight",
        {
            _HF + "self_attn.q_proj.weight": "query hidden",
            _HF + "self_attn.k_proj.weight": "kv hidden",
            _HF + "self_attn.v_proj.weight": "kv hidden",
        },
        layout="groups",
    ),
    Weight(_ATTENTION + "linear_proj.weight", {_HF + "self_attn.o_proj.weight": "hidden query"}),
    Weight(_MLP + "linear_fc1.layer_norm_weight", {_HF + "post_attention_layernorm.weight": "hidden"}),
    Weight(
        _MLP + "linear_fc1.weight",
        {_HF + "mlp.gate_proj.weight": "ffn hidden", _HF + "mlp.up_proj.weight": "ffn hidden"},
    ),
    Weight(_MLP + "linear_fc2.weight", {_HF + "mlp.down_proj.weight": "hidden ffn"}),
    Weight("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}),
)
_QKV_BIAS = Weight(
    _ATTENTION + "linear_qkv.bias",
    {
        _HF + "self_attn.q_proj.bias": "query",
        _HF + "self_attn.k_proj.bias": "kv",
        _HF + "self_attn.v_proj.bias": "kv",
    },
    layout="groups",
)
_QK_NORM = (
    Weight(_ATTENTION + "q_layernorm.weight", {_HF + "self_attn.q_norm.weight": "head"}),
    Weight(_ATTENTION + "k_layernorm.weight", {_HF + "self_attn.k_norm.weight": "head"}),
)
_OUTPUT = Weight("output_layer.weight", {"lm_head.weight": "vocab hidden"})

# Modules whose `_extra_state` (fp8 scales) Megatron's layers ask for on load: Transformer Engine's and, for the
# first four, the local ones too. An empty state means "no fp8 history".
EXTRA_STATE_LAYERED = tuple(
    f"decoder.layers.{module}._extra_state"
    for module in (
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
        "self_attention.core_attention",
        "self_attention.q_layernorm",
        "self_attention.k_layernorm",
    )
)
EXTRA_STATE_SINGLE = ("decoder.final_layernorm._extra_state",)


def weight_map(arch: Architecture) -> tuple[Weight, ...]:
    """The map of one model: what all have, biases and norms where it has them; a tied model has no output layer of its own."""
    biases, norms = ((_QKV_BIAS,) if arch.qkv_bias else ()), (_QK_NORM if arch.qk_norm else ())
    return (*_DECODER, *biases, *norms, *(() if arch.tied else (_OUTPUT,)))


def instances(arch: Architecture) -> Iterator[tuple[Weight, int]]:
    """(weight, layer) over the whole model, layer by layer; layer is 0 for what is not in a layer."""
    weights = weight_map(arch)
    yield from ((weight, 0) for weight in weights if not weight.layered)
    for layer in range(arch.num_layers):
        yield from ((weight, layer) for weight in weights if weight.layered)


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the Hugging Face model."""
    return {
        name: shape
        for weight, layer in instances(arch)
        for name, shape in zip(weight.hf_names(layer), weight.hf_shapes(arch), strict=True)
    }


def num_parameters(arch: Architecture) -> int:
    """Parameters, a tied embedding counted once."""
    return sum(prod(shape) for shape in hf_shapes(arch).values())


def to_groups(read: Callable[[int], torch.Tensor], arch: Architecture) -> torch.Tensor:
    """Interleave queries, keys and values [rows, …] per KV group; `read(i)` fetches part i only when it is due."""
    groups = arch.num_query_groups
    out, row = None, 0
    for part in range(3):
        rows = read(part).unflatten(0, (groups, -1))
        if out is None:
            per_group = rows.shape[1] + 2 * arch.kv_channels
            out = rows.new_empty(groups, per_group, *rows.shape[2:])
        out[:, row : row + rows.shape[1]] = rows
        row += rows.shape[1]
        del rows
    return out.flatten(0, 1)


def from_groups(fused: torch.Tensor, arch: Architecture) -> Iterator[torch.Tensor]:
    """The inverse of `to_groups`: queries, keys and values, one after the other."""
    rows = fused.unflatten(0, (arch.num_query_groups, -1))
    per_query = arch.num_attention_heads // arch.num_query_groups * arch.kv_channels
    for part in rows.split((per_query, arch.kv_channels, arch.kv_channels), dim=1):
        yield part.flatten(0, 1).contiguous()
