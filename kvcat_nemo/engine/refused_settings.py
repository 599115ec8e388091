"""Settings of Megatron's and NeMo's model configurations that are refused, each with its reason and what to do."""

from __future__ import annotations

from dataclasses import dataclass


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
