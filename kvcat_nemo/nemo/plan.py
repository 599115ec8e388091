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
    trainer = recipe.trainer
    config = fdl.build(recipe.model.config)
    layout = checked_layout(
        config, trainer.strategy, recipe.data, recipe.optim.config, trainer.devices * trainer.num_nodes
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
        "mask_span": config.kvcat.mask_span,
        "prefix_keep": [config.kvcat.prefix_keep_min, config.kvcat.prefix_keep_max]
        if config.kvcat.masks_prefix
        else None,
        "memory_per_gpu_bytes": memory_per_gpu(config, layout),
        "flops_per_step": flops_per_step(config, layout),
        "tokens_per_step": tokens,
        "steps": trainer.max_steps,
        "tokens": tokens * trainer.max_steps,
    }


def checked_layout(config, strategy, data, optimizer, world_size: int) -> Layout:
    """The layout of a run whose parts fit together.

    Args:
        config: a model configuration; it gets the strategy's parallel sizes.
        strategy, data, optimizer: the strategy, the data module and the optimizer's settings, built or still to be built.

    Raises:
        ValueError: when a setting does not fit, naming the field, the value and the fix.
    """
    for name in PARALLEL_FIELDS:
        setattr(config, name, getattr(strategy, name))
    group = strategy.microbatch_group_size_per_vp_stage
    config.microbatch_group_size_per_vp_stage = group or strategy.pipeline_model_parallel_size
    _refuse_untested(strategy, optimizer)
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


def _refuse_untested(strategy, optimizer) -> None:
    ddp = getattr(strategy, "ddp_config", None) or getattr(
        strategy, "ddp", None
    )  # built, or still to be built
    instances = strategy.num_distributed_optimizer_instances
    if instances > 1:
        raise ValueError(
            f"trainer.strategy.num_distributed_optimizer_instances={instances}: gradient norms would count every instance; set it to 1"
        )
    for name in ("use_megatron_fsdp", "use_custom_fsdp"):
        if getattr(ddp, name, False):
            raise ValueError(
                f"trainer.strategy.ddp.{name}=True: sharded parameters are not supported; set it to False "
                "(optim.config.use_distributed_optimizer=True shards the optimizer)"
            )
    if getattr(optimizer, "overlap_param_gather_with_optimizer_step", False):
        raise ValueError(
            "optim.config.overlap_param_gather_with_optimizer_step=True: the second half of the parameters would be gathered "
            "during the next forward without a test that it is in time; set it to False"
        )
    if getattr(ddp, "overlap_param_gather", False) and not optimizer.use_distributed_optimizer:
        raise ValueError(
            "trainer.strategy.ddp.overlap_param_gather=True: only a distributed optimizer gathers parameters; set it to False, "
            "or optim.config.use_distributed_optimizer=True"
        )
