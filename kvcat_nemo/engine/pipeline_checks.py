"""Which pipeline layouts a layer group's mask allows, and what to take in place of one that it does not.

A mask is made by its group's first layer and used by the others: it lives on one stage. A group that began on one stage
and went on in the next would need its mask, and the mask's gradient, to travel with the hidden states.
"""

from __future__ import annotations

from kvcat_nemo.engine import hardware
from kvcat_nemo.method.config import KVCatConfig

_UNEVEN_SPLIT_FIELDS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def validate_stages(config) -> None:
    """Refuse pipelines whose stages do not fit the layers, the layer groups, or the exchange between two stages.

    Args:
        config: a TransformerConfig with a `kvcat` field.

    Raises:
        ValueError: naming the field, the value, and the nearest values that work.
    """
    stages, chunks = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    if chunks is not None:
        _validate_interleaving(config, stages, chunks)
    if stages == 1:
        return
    if chunks is None and config.overlap_p2p_comm:
        raise ValueError(
            "model.config.overlap_p2p_comm=True: only interleaved stages overlap their exchange; set it to False, or "
            "virtual_pipeline_model_parallel_size to 2 or more"
        )
    for name in _UNEVEN_SPLIT_FIELDS:
        if getattr(config, name, None):
            raise ValueError(
                f"model.config.{name}={getattr(config, name)!r}: uneven pipeline stages are not supported; unset it"
            )
    parts = stages * (chunks or 1)
    if config.num_layers % parts:
        fitting = [p for p in range(1, config.num_layers + 1) if config.num_layers % (p * (chunks or 1)) == 0]
        fix = (
            f"use {_nearest(fitting, stages)}"
            if fitting
            else "set virtual_pipeline_model_parallel_size to None"
        )
        of = f"{stages} stages" + (f" of {chunks} chunks" if chunks else "")
        raise ValueError(
            f"model.config.pipeline_model_parallel_size={stages}: {config.num_layers} layers do not divide into {of}; {fix}"
        )
    if config.kvcat.gate_policy.has_routers:
        _refuse_straddling_groups(config, stages, chunks or 1)


def _validate_interleaving(config, stages: int, chunks: int) -> None:
    name = f"model.config.virtual_pipeline_model_parallel_size={chunks}"
    if chunks < 2:
        raise ValueError(f"{name}: one chunk a stage is a plain pipeline; set it to None")
    if stages == 1:
        raise ValueError(f"{name}: chunks of one stage have nothing to interleave with; set it to None")
    if config.overlap_p2p_comm and config.batch_p2p_comm:
        raise ValueError(
            "model.config.batch_p2p_comm=True: a batched exchange cannot overlap (overlap_p2p_comm=True); set it to False"
        )
    if stages == 2 and config.batch_p2p_comm:
        # Both neighbours are the same rank: a batch holds two messages to it and two from it, which are matched in the
        # order of issue. Each rank sends to its "previous" neighbour first, and receives from its "previous" one first,
        # so a gradient is taken for an activation. Megatron-LM's own arguments refuse it as well.
        raise ValueError(
            f"model.config.batch_p2p_comm=True with two interleaved stages ({name}): activations and gradients, both sent "
            "to the same rank in one batch, would be taken for one another; set batch_p2p_comm=False (and "
            "overlap_p2p_comm=True, to overlap them with computation)"
        )
    if config.overlap_p2p_comm and config.deallocate_pipeline_outputs and not hardware.is_cuda():
        # NCCL orders the release after the send; gloo's thread reads the memory whenever it comes to it.
        raise ValueError(
            "model.config.deallocate_pipeline_outputs=True with overlap_p2p_comm=True on a CPU host: outputs would be freed "
            "while they are being sent; set it to False"
        )


def _refuse_straddling_groups(config, stages: int, chunks: int) -> None:
    kvcat: KVCatConfig = config.kvcat
    layers, groups = config.num_layers, kvcat.num_groups
    if _fits(layers, groups, stages * chunks, kvcat):
        return
    firsts, starts = _firsts(layers, stages * chunks), kvcat.group_starts(layers)
    boundary = next(first for first in firsts if first not in starts)
    group = kvcat.group_of_layer(boundary, layers)
    last = [*starts, layers][group + 1] - 1
    others = [
        p for p in range(1 if chunks == 1 else 2, layers + 1) if _fits(layers, groups, p * chunks, kvcat)
    ]
    fixes = [f"pipeline_model_parallel_size={_nearest(others, stages)}"] if others else []
    if chunks > 1:
        fewer = [v for v in range(2, layers + 1) if _fits(layers, groups, stages * v, kvcat)]
        plain = ["None"] if _fits(layers, groups, stages, kvcat) else []
        if fewer or plain:
            near = [_nearest(fewer, chunks)] if fewer else []
            fixes.append(f"virtual_pipeline_model_parallel_size={' or '.join(near + plain)}")
    counts = [g for g in range(1, layers + 1) if _fits(layers, g, stages * chunks, kvcat)]
    fixes.append(f"kvcat.num_groups={_nearest(counts, groups)}")
    raise ValueError(
        f"kvcat.num_groups={groups} with pipeline_model_parallel_size={stages}"
        + (f" and virtual_pipeline_model_parallel_size={chunks}" if chunks > 1 else "")
        + f": group {group} (layers {starts[group]} to {last}) straddles the pipeline stage that begins at layer {boundary}, "
        f"and its mask does not travel between stages. Nearest that work, each by itself: {'; '.join(fixes)}"
    )


def _firsts(layers: int, parts: int) -> range:
    return range(0, layers, layers // parts)


def _fits(layers: int, groups: int, parts: int, kvcat: KVCatConfig) -> bool:
    """Whether every one of `parts` equal stages or chunks begins with a group's first layer."""
    starts = {i * layers // groups for i in range(groups)}
    return layers % parts == 0 and all(first in starts for first in _firsts(layers, parts))


def _nearest(values: list[int], wanted: int) -> str:
    """The largest value below and the smallest above."""
    below = [v for v in values if v < wanted][-1:]
    above = [v for v in values if v > wanted][:1]
    return " or ".join(map(str, below + above))
