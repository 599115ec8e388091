"""Every setting of Megatron's and NeMo's configurations: tested with the paired pass, refused, or none of its business.

A setting that nobody looked at is how a run starts and ends wrong. So each field stands in exactly one of the tables below,
and a field that a newer Megatron brings is refused unless it has its default. docs/settings.md shows the tables; a test
holds them to the classes' fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refused:
    """Values that are refused: all but `but`."""

    why: str
    """Why, and what to do: the end of the message."""
    but: tuple = (None, False)
    """Accepted values."""


NO_MOE = "mixture-of-experts models are not supported; use a dense model"
NO_MLA = "KV slots of latent attention are not supported; use a model with plain or grouped heads"
NO_GRAPHS = "a graph replays fixed inputs, and the layers' mask (with the documents' boundaries) is an input that it does not carry; "
ONE_SCALE = (
    "linear layers would quantise [dense | masked] by one scale, so the teacher's half would depend on the student's, and the "
    "losses' output layer is computed in bf16 all the same (core attention, too, would stay in bf16); "
)
ATTENTION = "gated attention needs bf16 or float32; set it to None or False"

MODEL: dict[str, Refused] = {
    "attention_dropout": Refused("the two passes must see the same attention; set it to 0.0", (0, None)),
    "hidden_dropout": Refused(
        "dropout would be the teacher's and the student's difference; set it to 0.0", (0, None)
    ),
    "calculate_per_token_loss": Refused("the routers' loss is scaled per micro-batch; set it to False"),
    "mtp_num_layers": Refused(
        "multi-token prediction is not supported with a paired pass; set it to None", (None, 0)
    ),
    "num_moe_experts": Refused(NO_MOE, (None, 0)),
    "moe_shared_expert_intermediate_size": Refused(NO_MOE, (None, 0)),
    "overlap_moe_expert_parallel_comm": Refused(NO_MOE),
    "expert_model_parallel_size": Refused("dense models have no experts to spread; set it to 1", (1,)),
    "multi_latent_attention": Refused(NO_MLA),
    "is_hybrid_model": Refused("layers without attention have no KV slots; use a transformer"),
    "heterogeneous_block_specs": Refused("layers of several kinds are not supported; set it to False"),
    "experimental_attention_variant": Refused("the attention is the paired pass' own; set it to None"),
    "linear_attention_freq": Refused("layers without KV slots are not supported; set it to None"),
    "attention_output_gate": Refused("no converted model has such a gate; set it to False"),
    # Precision
    "fp8": Refused(ONE_SCALE + "set it to None"),
    "fp8_param": Refused(ONE_SCALE + "set it to False"),
    "fp8_dot_product_attention": Refused(ATTENTION),
    "fp8_multi_head_attention": Refused(ATTENTION),
    "fp4": Refused(ONE_SCALE + "set it to None"),
    "fp4_param": Refused(ONE_SCALE + "set it to False"),
    "quant_recipe": Refused(ONE_SCALE + "set it to None"),
    "use_kitchen": Refused("its layers are not those that the tests know; set it to False"),
    "use_kitchen_attention": Refused("the attention is the paired pass' own; set it to False"),
    "activation_func_fp8_input_store": Refused("it rounds what backward multiplies; set it to False"),
    "enable_autocast": Refused("parameters are cast once, by the trainer's precision; set it to False"),
    # Attention
    "attn_logit_softcapping": Refused("no fused kernel caps logits and gates them; use a model without"),
    "softmax_type": Refused(
        "the softmax over gated slots has no extra sink; set it to 'vanilla'", ("vanilla",)
    ),
    "window_size": Refused("gates are defined for attention over the whole context; set it to None"),
    "window_attn_skip_freq": Refused(
        "gates are defined for attention over the whole context; set it to None"
    ),
    "softmax_scale": Refused("conversion and export know 1/√(head dim) alone; set it to None"),
    "apply_query_key_layer_scaling": Refused("core attention scales by 1/√(head dim); set it to False"),
    "no_rope_freq": Refused("conversion and export know layers with rotary positions alone; set it to None"),
    "mrope_section": Refused("positions are those of one text; set it to None"),
    "qk_clip": Refused("it reads attention logits, which the kernels do not hand out; set it to False"),
    "log_max_attention_logit": Refused("the kernels do not hand out attention logits; set it to False"),
    "flash_decode": Refused("it is for inference; set it to False"),
    # Graphs and memory
    "enable_cuda_graph": Refused(NO_GRAPHS + "set it to False"),
    "external_cuda_graph": Refused(NO_GRAPHS + "set it to False"),
    "cuda_graph_impl": Refused(NO_GRAPHS + "set it to 'none'", ("none", None)),
    "cpu_offloading": Refused(
        "what attention, routers and losses save for backward is theirs, and nothing tests that it survives the way to the host "
        "and back; set it to False, and recompute instead (model.config.recompute_granularity)"
    ),
    "fine_grained_activation_offloading": Refused("nothing tests it; set it to False, and recompute instead"),
    "num_microbatches_with_partial_activation_checkpoints": Refused(
        "the routers' loss rides on the second run of a recomputed layer, in all micro-batches alike; set it to None"
    ),
    "defer_embedding_wgrad_compute": Refused(
        "the output weight's gradient is made with the losses, without the logits that deferring needs; set it to False"
    ),
    "delay_wgrad_compute": Refused("weight gradients are due when a stage's backward ends; set it to False"),
    "init_model_with_meta_device": Refused("routers draw their start on a real device; set it to False"),
    # Layers that the engine's spec does not build
    "use_transformer_engine_op_fuser": Refused(
        "the engine builds its layers itself and would pass over it; set it to None"
    ),
    "use_transformer_engine_full_layer_spec": Refused(
        "Transformer Engine's whole layer has no place for gates; set it to False"
    ),
    "use_te_activation_func": Refused(
        "the engine builds its layers itself and would pass over it; set it to False"
    ),
    "use_inference_optimized_layers": Refused("they are for inference; set it to False"),
    "inference_fuse_tp_communication": Refused("it is for inference; set it to False"),
    "symmetric_ar_type": Refused("it is for inference; set it to None"),
    "transformer_impl": Refused(
        "layers are Transformer Engine's where it is, else Megatron's own; leave it out",
        ("transformer_engine", "local"),
    ),
    "apply_residual_connection_post_layernorm": Refused(
        "no converted model adds its residuals there; set it to False"
    ),
    "rotary_interleaved": Refused("converted models do not interleave rotary pairs; set it to False"),
    "layernorm_zero_centered_gamma": Refused("conversion does not know it; set it to False"),
    # Communication
    "tp_comm_overlap": Refused(
        "Transformer Engine's user buffers have one fixed shape, and NeMo makes it of one window batch and config.seq_length; a "
        "paired pass sends two of the data's length. Set it to False: tensor and sequence parallelism work without"
    ),
    "tp_comm_overlap_cfg": Refused("it belongs to tp_comm_overlap, which is refused; set it to None"),
    "variable_seq_lengths": Refused("all windows have data.seq_length tokens; set it to False"),
    "use_ring_exchange_p2p": Refused("stages exchange by send and receive; set it to False"),
    "moe_extended_tp": Refused(NO_MOE),
    "test_mode": Refused("it changes what layers compute; set it to False"),
    "fp16_lm_cross_entropy": Refused("losses are float32; set it to False"),
    "scatter_embedding_sequence_parallel": Refused("layers expect their slice; set it to True", (True, None)),
    "parallel_output": Refused("losses are made of each rank's part; set it to True", (True, None)),
}
"""Fields of a model's configuration whose other values are refused wherever a recipe is checked."""

CONDITIONAL: dict[str, str] = {
    "bf16": "and float16 is refused for gated attention (kernels)",
    "fp16": "refused for gated attention (kernels)",
    "params_dtype": "bf16 on CUDA, float32 on a CPU host",
    "normalization": "RMSNorm; another one with Transformer Engine alone",
    "add_qkv_bias": "as converted",
    "qk_layernorm": "as converted",
    "gated_linear_unit": "as converted",
    "num_attention_heads": "divided by the tensor-parallel ranks",
    "num_query_groups": "divided by the tensor-parallel ranks",
    "ffn_hidden_size": "divided by the tensor-parallel ranks",
    "kv_channels": "what a kernel takes",
    "num_layers": "whole stages, groups within a stage",
    "tensor_model_parallel_size": "parallel matrix",
    "sequence_parallel": "with tensor parallelism; parallel matrix",
    "pipeline_model_parallel_size": "layer groups within a stage; parallel matrix",
    "virtual_pipeline_model_parallel_size": "two or more chunks of two or more stages; parallel matrix",
    "context_parallel_size": "keys, values and gates are gathered; parallel matrix",
    "cp_comm_type": "None or 'all_gather'",
    "hierarchical_context_parallel_sizes": "None",
    "microbatch_group_size_per_vp_stage": "at least the stages; parallel matrix",
    "num_layers_in_first_pipeline_stage": "refused with pipelines",
    "num_layers_in_last_pipeline_stage": "refused with pipelines",
    "pipeline_model_parallel_layout": "refused with pipelines",
    "account_for_embedding_in_pipeline_split": "refused with pipelines",
    "account_for_loss_in_pipeline_split": "refused with pipelines",
    "overlap_p2p_comm": "interleaved pipelines; parallel matrix",
    "batch_p2p_comm": "not with two interleaved stages",
    "deallocate_pipeline_outputs": "not with overlap_p2p_comm on a CPU host",
    "recompute_granularity": "parallel matrix",
    "recompute_method": "parallel matrix",
    "recompute_num_layers": "parallel matrix",
    "recompute_modules": "core_attn, mlp; layernorm with Transformer Engine alone",
    "distribute_saved_activations": "refused with recomputation of a paired pass",
    "gradient_accumulation_fusion": "where apex or Transformer Engine has it (CUDA)",
    "apply_rope_fusion": "where Transformer Engine has it (CUDA)",
    "share_embeddings_and_output_weights": "as converted",
    "use_cpu_initialization": "CPU hosts",
    "seq_length": "the data's is used",
    "attention_backend": "of Megatron's core attention; the kernel is kvcat.attention_backend",
    "deterministic_mode": "docs/cluster.md",
    "rope_scaling": "default, linear or llama3, as the base has it",
    "seq_len_interpolation_factor": "the rope's linear kind, as the base has it",
    "vocab_size": "as converted",
    "kvcat": "the method's own settings",
}
"""Tested with the paired pass, or refused under a condition by engine.config_checks, engine.pipeline_checks, engine.cost or kernels."""

PASSES: dict[str, str] = {
    "hidden_size": "shape",
    "activation_func": "as converted",
    "layernorm_epsilon": "as converted",
    "add_bias_linear": "as converted",
    "glu_linear_offset": "inside a layer's MLP",
    "activation_func_clamp_value": "inside a layer's MLP",
    "use_fused_weighted_squared_relu": "inside a layer's MLP",
    "bias_activation_fusion": "inside a layer's MLP",
    "bias_dropout_fusion": "inside a layer; no dropout",
    "fp32_residual_connection": "between layers, of both passes alike",
    "persist_layer_norm": "a norm's kernel",
    "memory_efficient_layer_norm": "a norm's kernel",
    "fused_single_qkv_rope": "a kernel before core attention",
    "masked_softmax_fusion": "of Megatron's core attention, which is replaced",
    "attention_softmax_in_fp32": "of Megatron's core attention, which is replaced",
    "cross_entropy_loss_fusion": "of Megatron's losses, which are replaced",
    "cross_entropy_fusion_impl": "of Megatron's losses, which are replaced",
    "disable_bf16_reduced_precision_matmul": "PyTorch's matmuls",
    "disable_parameter_transpose_cache": "Transformer Engine's memory",
    "clone_scatter_output_in_embedding": "memory of the embedding",
    "cpu_offloading_num_layers": "of cpu_offloading",
    "_cpu_offloading_context": "of cpu_offloading",
    "cpu_offloading_activations": "of cpu_offloading",
    "cpu_offloading_weights": "of cpu_offloading",
    "cpu_offloading_double_buffering": "of cpu_offloading",
    "offload_modules": "of fine_grained_activation_offloading",
    "min_offloaded_tensor_size": "of fine_grained_activation_offloading",
    "cuda_graph_use_single_mempool": "of CUDA graphs",
    "cuda_graph_retain_backward_graph": "of CUDA graphs",
    "cuda_graph_warmup_steps": "of CUDA graphs",
    "cuda_graph_scope": "of CUDA graphs",
    "mtp_loss_scaling_factor": "of mtp_num_layers",
    "fp8_recipe": "of fp8",
    "fp8_margin": "of fp8",
    "fp8_interval": "of fp8",
    "fp8_amax_history_len": "of fp8",
    "fp8_amax_compute_algo": "of fp8",
    "fp8_wgrad": "of fp8",
    "tp_only_amax_red": "of fp8",
    "fp4_recipe": "of fp4",
    "first_last_layers_bf16": "of fp8",
    "num_layers_at_start_in_bf16": "of fp8",
    "num_layers_at_end_in_bf16": "of fp8",
    "kitchen_attention_backend": "of use_kitchen",
    "tp_comm_bulk_wgrad": "of tp_comm_overlap",
    "tp_comm_bulk_dgrad": "of tp_comm_overlap",
    "tp_comm_overlap_ag": "of tp_comm_overlap",
    "tp_comm_overlap_rs": "of tp_comm_overlap",
    "tp_comm_overlap_rs_dgrad": "of tp_comm_overlap",
    "tp_comm_split_ag": "of tp_comm_overlap",
    "tp_comm_atomic_ag": "of tp_comm_overlap",
    "tp_comm_split_rs": "of tp_comm_overlap",
    "tp_comm_atomic_rs": "of tp_comm_overlap",
    "tp_comm_overlap_disable_qkv": "of tp_comm_overlap",
    "tp_comm_overlap_disable_fc1": "of tp_comm_overlap",
    "tp_comm_bootstrap_backend": "of tp_comm_overlap",
    "async_tensor_model_parallel_allreduce": "Megatron's linear layers",
    "wgrad_deferral_limit": "of defer_embedding_wgrad_compute",
    "overlap_p2p_comm_warmup_flush": "of overlap_p2p_comm",
    "batch_p2p_sync": "of batch_p2p_comm",
    "pipeline_model_parallel_comm_backend": "how stages exchange, not what",
    "pipeline_dtype": "set from the precision",
    "autocast_dtype": "of enable_autocast",
    "expert_tensor_parallel_size": "of experts",
    "perform_initialization": "the start of weights, before a base is loaded",
    "init_method": "the start of weights",
    "output_layer_init_method": "the start of weights",
    "init_method_std": "the start of weights",
    "embedding_init_method": "the start of weights",
    "embedding_init_method_std": "the start of weights",
    "use_te_rng_tracker": "random numbers, of which a step draws none",
    "inference_rng_tracker": "inference",
    "inference_sampling_seed": "inference",
    "mlp_chunks_for_prefill": "inference",
    "batch_invariant_mode": "inference",
    "timers": "set by training",
    "finalize_model_grads_func": "set by training",
    "grad_scale_func": "set by training",
    "no_sync_func": "set by training",
    "grad_sync_func": "set by training",
    "param_sync_func": "set by training",
    "barrier_with_L1_time": "timers",
    "config_logger_dir": "logging",
    "hetereogenous_dist_checkpoint": "of heterogeneous_block_specs",
    "qk_clip_alpha": "of qk_clip",
    "qk_clip_threshold": "of qk_clip",
    "make_vocab_size_divisible_by": "padding, which takes no probability",
    "position_embedding_type": "as converted",
    "rotary_base": "as converted",
    "rotary_percent": "as converted",
    "max_position_embeddings": "Hugging Face's; no part of the model",
    "scale_factor": "as converted",
    "low_freq_factor": "as converted",
    "high_freq_factor": "as converted",
    "old_context_len": "as converted",
    "transformer_layer_spec": "the engine builds its own",
    "forward_step_fn": "the module has its own",
    "data_step_fn": "the module has its own",
    "generation_config": "inference",
    "true_vocab_size": "padding, which takes no probability",
    "linear_conv_kernel_dim": "of linear_attention_freq",
    "linear_key_head_dim": "of linear_attention_freq",
    "linear_value_head_dim": "of linear_attention_freq",
    "linear_num_key_heads": "of linear_attention_freq",
    "linear_num_value_heads": "of linear_attention_freq",
    "mamba_state_dim": "of is_hybrid_model",
    "mamba_head_dim": "of is_hybrid_model",
    "mamba_num_groups": "of is_hybrid_model",
    "mamba_num_heads": "of is_hybrid_model",
    "use_mamba_mem_eff_path": "of is_hybrid_model",
}
"""Without bearing on the paired pass, or parts of a setting that stands elsewhere."""

PARTS_OF_REFUSED = ("moe_", "dsa_")
"""Beginnings of names that mean something only with a field that is refused (experts, a variant of attention)."""


def verdict_on(name: str) -> tuple[str, str] | None:
    """("tested", …), ("refused", …) or ("passes", …) and the reason; None when no table knows the field."""
    if name in MODEL:
        return "refused", MODEL[name].why
    if name in CONDITIONAL:
        return "tested", CONDITIONAL[name]
    if name in PASSES:
        return "passes", PASSES[name]
    if name.startswith(PARTS_OF_REFUSED):
        return "passes", f"of {name.partition('_')[0]} layers, which are refused"
    return None


def check_model_settings(config) -> None:
    """Refuse values that the tables refuse, and fields unknown to them that do not have their default.

    Raises:
        ValueError: naming the field, the value, why, and what to do.
    """
    check(config, MODEL, "model.config")
    for field in dataclasses.fields(config) if dataclasses.is_dataclass(config) else ():
        if verdict_on(field.name) is not None:
            continue
        value, usual = getattr(config, field.name), _default(field)
        if value != usual:
            raise ValueError(
                f"model.config.{field.name}={value!r}: this version of Megatron-core or NeMo knows it, kvcat-nemo has no test of "
                f"it; leave it at {usual!r}"
            )


def check(settings: Any, table: Mapping[str, Refused], where: str) -> None:
    """Refuse what a table refuses, on an object (or a configuration of one that is still to be built)."""
    for name, rule in table.items():
        value = getattr(settings, name, None)
        if value is None or any(value is but or value == but for but in rule.but):
            continue
        if value == [] or value == ():
            continue
        raise ValueError(f"{where}.{name}={value!r}: {rule.why}")


def _default(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None
