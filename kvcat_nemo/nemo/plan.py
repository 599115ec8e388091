"""Checks a recipe and says what it would do, without starting anything."""

from __future__ import annotations

import dataclasses
from typing import Any

import fiddle as fdl

from kvcat_nemo.engine.config import validate_model_config
from kvcat_nemo.engine.plan import Layout, flops_per_step, memory_per_gpu, parameters
from kvcat_nemo.nemo.settings import check_run_settings


def plan(recipe) -> dict[str, Any]:
    """Parameters, layout, memory per GPU, FLOPs and tokens of a recipe.

    Args:
        recipe: a KV-CAT recipe (a fiddle Partial of llm.pretrain), overrides applied.

    Raises:
        ValueError: when a setting does not fit, naming the field, the value and the fix.
    """
    trainer = recipe.trainer
    try:
        config = fdl.build(recipe.model.config)
    except (AssertionError, NotImplementedError) as error:  # Megatron's own refusals
        raise ValueError(f"model.config: {error}") from error
    layout = checked_layout(
        config,
        trainer.strategy,
        recipe.data,
        recipe.optim.config,
        trainer.devices * trainer.num_nodes,
        trainer.plugins,
        trainer.callbacks,
    )
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


def checked_layout(
    config, strategy, data, optimizer, world_size: int, precision=None, callbacks=()
) -> Layout:
    """The layout of a run whose parts fit together.

    Args:
        config: a model configuration; it gets the strategy's parallel sizes.
        strategy, data, optimizer, precision, callbacks: the strategy, the data module, the optimizer's settings, the precision
            plugin and the trainer's callbacks, built or still to be built.

    Raises:
        ValueError: when a setting does not fit, naming the field, the value and the fix.
    """
    for name in PARALLEL_FIELDS:
        setattr(config, name, getattr(strategy, name))
    group = strategy.microbatch_group_size_per_vp_stage
    config.microbatch_group_size_per_vp_stage = group or strategy.pipeline_model_parallel_size
    check_run_settings(strategy, optimizer, precision, callbacks)
    if config.kvcat.paired and _is_half(precision):
        raise ValueError(
            "trainer.plugins.precision='16-mixed': float16 cannot hold the weights of dropped slots; set it to 'bf16-mixed'"
        )
    validate_model_config(config)
    layout = Layout(
        world_size=world_size,
        tensor=strategy.tensor_model_parallel_size,
        pipeline=strategy.pipeline_model_parallel_size,
        sequence_parallel=bool(strategy.sequence_parallel),
        distributed_optimizer=bool(optimizer.use_distributed_optimizer),
        micro_batch_size=data.micro_batch_size,
        global_batch_size=data.global_batch_size,
        seq_length=data.seq_length,
        context=strategy.context_parallel_size,
        packed_documents=bool(getattr(data, "packed_documents", False)),
    )
    layout.check(config)
    return layout


PARALLEL_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "expert_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)
"""What a strategy decides about a model configuration, as far as checks go."""


def _is_half(precision) -> bool:
    """Whether a precision plugin, built or still to be built, is float16's."""
    built = getattr(precision, "dtype_config", None)
    return (
        built.fp16
        if built is not None
        else str(getattr(precision, "precision", "")) in ("16", "16-mixed", "fp16-mixed")
    )
