"""Settings of the strategy, of data parallelism, of the precision and of the optimizer: tested, refused, or passed on.

The model's stand in engine/megatron_settings.py. `kvcat train plan` and every start ask `check_run_settings`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import fiddle as fdl

from kvcat_nemo.engine.megatron_settings import check
from kvcat_nemo.engine.refused_settings import MODEL, ONE_SCALE, Refused

NO_FSDP = "sharded parameters are not supported; set it to {}"
FSDP = NO_FSDP.format("False") + " (optim.config.use_distributed_optimizer=True shards the optimizer)"

STRATEGY: dict[str, Refused] = {
    "num_distributed_optimizer_instances": Refused(
        "gradient norms would count every instance; set it to 1", (1, None)
    ),
    "fsdp": Refused(NO_FSDP.format("None"), (None,)),
    "save_ckpt_format": Refused(
        "manifests, resuming and export know torch_dist; set it to 'torch_dist'", ("torch_dist",)
    ),
    "ckpt_load_main_params": Refused(
        "a run resumes with its optimizer, and starts from a base without; set it to False"
    ),
    "encoder_tensor_model_parallel_size": Refused("there is no encoder; set it to 0", (0, None)),
    "encoder_pipeline_model_parallel_size": Refused("there is no encoder; set it to 0", (0, None)),
    "moe_extended_tp": Refused("mixture-of-experts models are not supported; set it to False"),
    "lazy_init": Refused("routers draw their start on a real device; set it to False"),
}

DDP: dict[str, Refused] = {
    "use_megatron_fsdp": Refused(FSDP),
    "use_custom_fsdp": Refused(FSDP),
    "fp8_param_gather": Refused(ONE_SCALE + "set it to False"),
    "reuse_grad_buf_for_mxfp8_param_ag": Refused(ONE_SCALE + "set it to False"),
    "num_distributed_optimizer_instances": STRATEGY["num_distributed_optimizer_instances"],
    "delay_wgrad_compute": MODEL["delay_wgrad_compute"],
}

PRECISION: dict[str, Refused] = {
    "fp8": Refused(ONE_SCALE + "set it to None", (None,)),
    "fp8_params": Refused(ONE_SCALE + "set it to None"),
    "fp8_param_gather": Refused(ONE_SCALE + "set it to None"),
    "fp8_dot_product_attention": Refused("gated attention needs bf16 or float32; set it to False"),
    "fp8_multi_head_attention": Refused("gated attention needs bf16 or float32; set it to False"),
    "fp4": Refused(ONE_SCALE + "set it to None", (None,)),
    "reuse_grad_buf_for_mxfp8_param_ag": Refused(ONE_SCALE + "set it to False"),
    "autocast_enabled": Refused("parameters are cast once, by the precision; set it to False"),
}

OPTIMIZER: dict[str, Refused] = {
    "overlap_param_gather_with_optimizer_step": Refused(
        "the second half of the parameters would be gathered during the next forward without a test that it is in time; "
        "set it to False"
    ),
    "optimizer_cpu_offload": Refused("nothing tests it with exact resuming; set it to False"),
    "use_precision_aware_optimizer": Refused("nothing tests it with exact resuming; set it to False"),
    "fp8_recipe": Refused(ONE_SCALE + "set it to None", (None,)),
}

PASSES: dict[str, str] = {
    # Strategy
    "data_sampler": "the data module's",
    "parallel_devices": "Lightning's",
    "cluster_environment": "Lightning's",
    "checkpoint_io": "the strategy's own, which writes the manifest of what it saves",
    "find_unused_parameters": "PyTorch's data parallelism, which is not used",
    "gradient_as_bucket_view": "PyTorch's data parallelism, which is not used",
    "ckpt_include_optimizer": "an older name, which NeMo passes over",
    "ckpt_load_optimizer": "without it a run does not resume exactly",
    "ckpt_save_optimizer": "without it a run does not resume exactly",
    "ckpt_load_strictness": "what to do with a checkpoint of other parameters",
    "ckpt_torch_dist_multiproc": "how a checkpoint is written, not what",
    "ckpt_assume_constant_structure": "how a checkpoint is written, not what",
    "ckpt_parallel_save_within_dp": "how a checkpoint is written, not what",
    "ckpt_load_directly_on_device": "how a checkpoint is read, not what",
    "ckpt_parallel_save_optim": "an older name, which NeMo passes over",
    "pipeline_dtype": "set from the precision",
    "use_te_rng_tracker": "random numbers, of which a step draws none",
    "use_sharp": "how NCCL sums, not what",
    "setup_optimizers": "set by NeMo",
    "init_model_parallel": "set by NeMo",
    "replace_progress_bar": "what is printed",
    "progress_interval": "what is printed",
    "restore_config": "set by resume",
    "megatron_log_level": "what is printed",
    "use_tp_pp_dp_mapping": "which ranks are neighbours",
    "nccl_communicator_config_path": "how NCCL sums, not what",
    "use_gloo_process_groups": "needed by distrib_optim_fully_reshardable_mem_efficient",
    "pipeline_model_parallel_comm_backend": "how stages exchange, not what",
    "expert_tensor_parallel_size": "of experts",
    # Data parallelism
    "check_for_nan_in_grad": "off: it ends one rank alone; the guard looks on behalf of all (optim.nonfinite)",
    "check_for_large_grads": "off: it ends one rank alone; the guard looks on behalf of all (optim.nonfinite)",
    "bucket_size": "how much is sent at a time; the reshard tests move it",
    "pad_buckets_for_high_nccl_busbw": "how much is sent at a time",
    "gradient_reduce_div_fusion": "of FSDP",
    "data_parallel_sharding_strategy": "of FSDP",
    "suggested_communication_unit_size": "of FSDP",
    "preserve_fp32_weights": "of FSDP",
    "keep_fp8_transpose_cache": "of FSDP",
    "keep_fp8_transpose_cache_when_using_custom_fsdp": "of FSDP",
    "fsdp_double_buffer": "of FSDP",
    "outer_dp_sharding_strategy": "of FSDP",
    "disable_symmetric_registration": "of FSDP",
    "nccl_ub": "of FSDP",
    # Precision
    "precision": "float16 is refused for gated attention (kernels)",
    "params_dtype": "of the precision",
    "autocast_dtype": "of autocast_enabled",
    "fp8_recipe": "of fp8",
    "first_last_layers_bf16": "of fp8",
    "fp8_margin": "of fp8",
    "fp8_amax_history_len": "of fp8",
    "fp8_amax_compute_algo": "of fp8",
    "fp8_wgrad": "of fp8",
    "fp4_recipe": "of fp4",
    "num_layers_at_start_in_bf16": "of fp8",
    "num_layers_at_end_in_bf16": "of fp8",
    "fp16_loss_scale": "of float16",
    "fp16_initial_loss_scale": "of float16",
    "fp16_min_loss_scale": "of float16",
    "fp16_loss_scale_window": "of float16",
    "fp16_hysteresis": "of float16",
}
"""Without bearing on the paired pass, or parts of a setting that stands elsewhere."""

TESTED: dict[str, str] = {
    "ddp": "its own table",
    "ckpt_async_save": "kill and resume tests",
    "ckpt_parallel_save": "every save",
    "ckpt_parallel_load": "CUDA hosts; kvcat train doctor --gpu",
    "ckpt_optim_fully_reshardable": "on: a checkpoint of the distributed optimizer fits other layouts; reshard tests",
    "distrib_optim_fully_reshardable_mem_efficient": "reshard tests",
    "grad_reduce_in_fp32": "parallel matrix",
    "overlap_grad_reduce": "parallel matrix",
    "overlap_param_gather": "with the distributed optimizer; parallel matrix",
    "align_param_gather": "parallel matrix",
    "use_distributed_optimizer": "parallel matrix, reshard tests",
    "average_in_collective": "NCCL averages where gloo sums; reshard tests, with gloo's sum divided",
}
"""Tested with the paired pass, beside the parallel sizes, which are the model's too."""


CALLBACK: dict[str, Refused] = {
    "tp_comm_overlap": MODEL["tp_comm_overlap"],
    "overlap_param_gather_with_optimizer_step": OPTIMIZER["overlap_param_gather_with_optimizer_step"],
    "defer_embedding_wgrad_compute": MODEL["defer_embedding_wgrad_compute"],
}
"""Of MegatronCommOverlapCallback, which writes its settings over the checked ones when the run has begun."""


def check_run_settings(
    strategy: Any, optimizer: Any, precision: Any = None, callbacks: Iterable = ()
) -> None:
    """Refuse settings that the tables refuse, built or still to be built (fiddle configurations).

    Raises:
        ValueError: naming the field, the value, why, and what to do.
    """
    check(strategy, STRATEGY, "trainer.strategy")
    ddp = getattr(strategy, "ddp_config", None) or getattr(strategy, "ddp", None)
    if isinstance(ddp, str) and ddp != "megatron":
        raise ValueError(
            f"trainer.strategy.ddp={ddp!r}: gradients are Megatron's; leave it out, or give its configuration"
        )
    if ddp is None:
        raise ValueError("trainer.strategy.ddp='pytorch': gradients are Megatron's; leave it out")
    check(ddp, DDP, "trainer.strategy.ddp")
    check(optimizer, OPTIMIZER, "optim.config")
    for plugin in precision if isinstance(precision, (list, tuple)) else (precision,):
        check(getattr(plugin, "dtype_config", plugin), PRECISION, "trainer.plugins")
    for callback in callbacks or ():
        kind = fdl.get_callable(callback) if isinstance(callback, fdl.Buildable) else type(callback)
        if any(cls.__name__ == "MegatronCommOverlapCallback" for cls in inspect.getmro(kind)):
            settings = getattr(callback, "user_comm_overlap_cfg", callback)
            check(settings, CALLBACK, "trainer.callbacks: MegatronCommOverlapCallback")
    if getattr(ddp, "overlap_param_gather", False) and not optimizer.use_distributed_optimizer:
        raise ValueError(
            "trainer.strategy.ddp.overlap_param_gather=True: only a distributed optimizer gathers parameters; set it to False, "
            "or optim.config.use_distributed_optimizer=True"
        )
