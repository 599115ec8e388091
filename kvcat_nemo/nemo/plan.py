"""Checks a recipe and says what it would do, without starting anything."""

from __future__ import annotations

import dataclasses
from typing import Any

import fiddle as fdl

from kvcat_nemo.engine.config import validate_model_config
from kvcat_nemo.engine.plan import Layout, flops_per_step, memory_per_gpu, parameters


def plan(recipe) -> dict[str, Any]:
    """Parameters, layout, memory per GPU, FLOPs and tokens of a recipe.

    Args:
        recipe: a KV-CAT recipe (a fiddle Partial of llm.pretrain), overrides applied.

    Raises:
        ValueError: when a setting does not fit, naming the field, the value and the fix.
    """
    strategy, trainer, data = recipe.trainer.strategy, recipe.trainer, recipe.data
    config = fdl.build(recipe.model.config)
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "sequence_parallel",
    ):
        setattr(config, name, getattr(strategy, name))
    validate_model_config(config)
    layout = Layout(
        world_size=trainer.devices * trainer.num_nodes,
        tensor=strategy.tensor_model_parallel_size,
        pipeline=strategy.pipeline_model_parallel_size,
        sequence_parallel=bool(strategy.sequence_parallel),
        distributed_optimizer=bool(recipe.optim.config.use_distributed_optimizer),
        micro_batch_size=data.micro_batch_size,
        global_batch_size=data.global_batch_size,
        seq_length=data.seq_length,
    )
    _check_divisions(config, layout)
    tokens = layout.global_batch_size * layout.seq_length
    return {
        "parameters": parameters(config),
        "layout": dataclasses.asdict(layout)
        | {"data": layout.data, "num_microbatches": layout.num_microbatches},
        "router_layers": list(config.kvcat.group_starts(config.num_layers))
        if config.kvcat.policy == "router"
        else [],
        "policy": config.kvcat.policy,
        "memory_per_gpu_bytes": memory_per_gpu(config, layout),
        "flops_per_step": flops_per_step(config, layout),
        "tokens_per_step": tokens,
        "steps": trainer.max_steps,
        "tokens": tokens * trainer.max_steps,
    }


def _check_divisions(config, layout: Layout) -> None:
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = getattr(config, name)
        if value % layout.tensor:
            raise ValueError(
                f"trainer.strategy.tensor_model_parallel_size={layout.tensor}: does not divide model.config.{name}={value}; "
                f"use {' or '.join(str(t) for t in range(1, value + 1) if value % t == 0 and t <= 16)}"
            )
    if config.num_layers % layout.pipeline:
        raise ValueError(
            f"trainer.strategy.pipeline_model_parallel_size={layout.pipeline}: does not divide model.config.num_layers={config.num_layers}"
        )
    if layout.sequence_parallel and layout.tensor == 1:
        raise ValueError(
            "trainer.strategy.sequence_parallel=True: needs tensor_model_parallel_size above 1; set it to False"
        )
    if layout.sequence_parallel and layout.seq_length % layout.tensor:
        raise ValueError(
            f"data.seq_length={layout.seq_length}: not a multiple of tensor_model_parallel_size={layout.tensor}"
        )
