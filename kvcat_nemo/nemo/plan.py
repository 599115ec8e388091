"""Checks a recipe and says what it would do, without starting anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import fiddle as fdl

from kvcat_nemo.common.limits import check_model_sizes, check_size
from kvcat_nemo.engine.config_checks import validate_model_config
from kvcat_nemo.engine.cost import Layout, flops_per_step, memory_per_gpu, parameters
from kvcat_nemo.nemo.base_model import check_base
from kvcat_nemo.nemo.data_order import SIZES
from kvcat_nemo.nemo.trainer_settings import check_run_settings


def plan(recipe) -> dict[str, Any]:
    """Parameters, layout, memory per GPU, FLOPs and tokens of a recipe.

    Args:
        recipe: a KV-CAT recipe (a fiddle Partial of llm.pretrain), overrides applied.

    Raises:
        ValueError: when a setting does not fit, naming the field, the value and the fix.
    """
    trainer = recipe.trainer
    check_trainer(trainer)
    check_model_sizes(recipe.model.config)  # before anything loops over them
    for name, kind in SIZES.items():
        if (value := getattr(recipe.data, name, None)) is not None:
            check_size(f"data.{name}", value, kind)
    devices = check_size("trainer.devices", trainer.devices, "workers")
    world_size = max(devices, 1) * check_size("trainer.num_nodes", trainer.num_nodes, "nodes")
    try:
        config = fdl.build(recipe.model.config)
    except (AssertionError, NotImplementedError) as error:  # Megatron's own refusals
        raise ValueError(f"model.config: {error}") from error
    layout = checked_layout(
        config,
        trainer.strategy,
        recipe.data,
        recipe.optim.config,
        world_size,
        trainer.plugins,
        trainer.callbacks,
    )
    base = getattr(recipe.resume, "base", None)
    # A plan may be made where the base is not.
    compared = bool(base) and Path(base).is_dir() and check_base(base, config)
    tokens = layout.global_batch_size * layout.seq_length
    return {
        "base": {"path": str(base), "compared": compared} if base else None,
        "parameters": parameters(config),
        "layout": dataclasses.asdict(layout)
        | {"data": layout.data, "num_microbatches": layout.num_microbatches},
        "router_layers": list(config.kvcat.group_starts(config.num_layers))
        if config.kvcat.gate_policy.has_routers
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


def check_trainer(trainer) -> None:
    """Refuse settings of a trainer with which a run never ends, or reads its windows again.

    Args:
        trainer: built, or still to be built.

    Raises:
        ValueError: naming the setting, its value, why, and what to set.
    """

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"trainer.{name}={getattr(trainer, name)!r}: {why}")

    if getattr(trainer, "accumulate_grad_batches", None) not in (None, 1):
        refuse(
            "accumulate_grad_batches",
            "Megatron accumulates gradients itself, over data.global_batch_size / (data.micro_batch_size × data-parallel ranks) "
            "micro-batches a step; with Lightning's accumulation no step would ever be counted. Set it to 1, and raise "
            "data.global_batch_size instead",
        )
    check_size("trainer.max_steps", trainer.max_steps, "steps")
    again = "the loader would begin anew and hand out the same windows again"
    limit = getattr(trainer, "limit_train_batches", None)
    if limit is not None and not (isinstance(limit, float) and limit == 1.0):
        refuse(
            "limit_train_batches", f"after so many batches {again}; leave it out, and set trainer.max_steps"
        )
    if getattr(trainer, "overfit_batches", None):
        refuse("overfit_batches", f"{again}; set it to 0, and make a small dataset of its own")
    if getattr(trainer, "reload_dataloaders_every_n_epochs", None):
        refuse("reload_dataloaders_every_n_epochs", f"{again}; set it to 0")
    for name in ("limit_val_batches", "limit_test_batches"):
        value = getattr(trainer, name, None)
        if isinstance(value, float) and 0 <= value <= 1:
            continue  # a share of the set
        if isinstance(value, float | str):
            refuse(name, "give a whole number of batches, or a share from 0.0 to 1.0")
        if value is not None:
            check_size(f"trainer.{name}", value, "val_batches")
    every = getattr(trainer, "val_check_interval", None)
    if isinstance(every, str) or (every is not None and not every > 0):
        refuse("val_check_interval", "give a number of steps of at least 1")


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
        value = getattr(strategy, name)
        if name.endswith("_parallel_size") and value is not None:
            value = check_size(f"trainer.strategy.{name}", value, "ranks")
        setattr(config, name, value)
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
    """Whether a precision plugin, or one of a trainer's list of plugins, built or still to be built, is float16's."""
    if isinstance(precision, (list, tuple)):
        return any(map(_is_half, precision))
    built = getattr(precision, "dtype_config", None)
    return (
        built.fp16
        if built is not None
        else str(getattr(precision, "precision", "")) in ("16", "16-mixed", "fp16-mixed")
    )
