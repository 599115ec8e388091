"""What a run will cost, from its configuration alone: parameters, memory per GPU, FLOPs.

Estimates follow "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198) for activations and
the usual 6·N FLOPs per token; both count the two passes of a paired batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvcat_nemo.kernels.losses.token_loss import LOSS_MEMORY_MIB
from kvcat_nemo.method.config import KVCatConfig


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over processes."""

    world_size: int
    tensor: int
    pipeline: int
    sequence_parallel: bool
    distributed_optimizer: bool
    micro_batch_size: int
    global_batch_size: int
    seq_length: int
    context: int = 1
    """Ranks that share each window."""
    packed_documents: bool = False

    @property
    def data(self) -> int:
        """Data-parallel ranks.

        Raises:
            ValueError: when the processes do not divide into model replicas, or the batch into micro-batches.
        """
        replica = self.tensor * self.pipeline * self.context
        if self.world_size % replica:
            context = f" × context {self.context}" if self.context > 1 else ""
            raise ValueError(
                f"{self.world_size} processes (trainer.devices × trainer.num_nodes) do not divide into replicas of {replica} "
                f"(tensor {self.tensor} × pipeline {self.pipeline}{context}); change one of them"
            )
        data = self.world_size // replica
        if self.global_batch_size % (data * self.micro_batch_size):
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size}: not a multiple of data.micro_batch_size={self.micro_batch_size} × "
                f"{data} data-parallel ranks; use {-(-self.global_batch_size // (data * self.micro_batch_size)) * data * self.micro_batch_size}"
            )
        return data

    @property
    def num_microbatches(self) -> int:
        return self.global_batch_size // (self.data * self.micro_batch_size)

    def check(self, config) -> None:
        """Refuse what does not fit a model configuration (engine.config_checks.validate_model_config sees no batch).

        Raises:
            ValueError: naming the field, the value and the fix.
        """
        _ = self.data
        if self.context > 1 and self.packed_documents:
            raise ValueError(
                f"data.packed_documents=True: not supported with context_parallel_size={self.context}; set it to False, or "
                "trainer.strategy.context_parallel_size=1"
            )
        slices = self.tensor if self.sequence_parallel else 1
        unit = slices if self.context == 1 else math.lcm(2 * self.context, slices * self.context)
        if self.seq_length % unit:
            why = [
                f"context parallelism cuts windows into 2 · {self.context} chunks"
                if self.context > 1
                else "",
                f"sequence parallelism splits them over tensor_model_parallel_size={slices}"
                if slices > 1
                else "",
            ]
            raise ValueError(
                f"data.seq_length={self.seq_length}: {' and '.join(filter(None, why))}, for which it must be a multiple of "
                f"{unit}; use {-(-self.seq_length // unit) * unit}"
            )
        kvcat = getattr(config, "kvcat", None)
        if kvcat is not None and kvcat.masks_prefix and kvcat.prefix_cut_multiple >= self.seq_length:
            raise ValueError(
                f"model.config.kvcat.prefix_cut_multiple={kvcat.prefix_cut_multiple}: no window of data.seq_length={self.seq_length} would "
                f"ever be cut, and nothing masked; give less than {self.seq_length}"
            )
        if not config.virtual_pipeline_model_parallel_size:
            return
        # The schedule runs micro-batches of a chunk in groups, by default as many as there are stages.
        group = getattr(config, "microbatch_group_size_per_vp_stage", None) or self.pipeline
        if group < self.pipeline:
            raise ValueError(
                f"model.config.microbatch_group_size_per_vp_stage={group}: fewer than the {self.pipeline} stages; set it to None"
            )
        if group > self.num_microbatches or 0 < self.num_microbatches % group < self.pipeline:
            unit = self.data * self.micro_batch_size * group
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size}: interleaved stages take micro-batches in groups of {group}, and "
                f"{self.num_microbatches} do not divide into them; use {-(-self.global_batch_size // unit) * unit}"
            )


def parameters(config) -> dict[str, int]:
    """Parameters by part: `embedding`, `output` (0 when tied), `layers`, `routers`, `norm`, and their `total`.

    Args:
        config: a Megatron configuration with `vocab_size`, `share_embeddings_and_output_weights` and `kvcat`.
    """
    width, ffn, head = config.hidden_size, config.ffn_hidden_size, config.kv_channels
    queries, keys = config.num_attention_heads * head, config.num_query_groups * head
    attention = width * (queries + 2 * keys) + queries * width
    attention += (queries + 2 * keys) if config.add_qkv_bias else 0
    attention += 2 * head if config.qk_layernorm else 0
    mlp = (3 if config.gated_linear_unit else 2) * width * ffn
    kvcat: KVCatConfig = config.kvcat
    router = kvcat.gate_policy.router_parameters(kvcat, width, config.num_query_groups)
    out = {
        "embedding": config.vocab_size * width,
        "output": 0 if config.share_embeddings_and_output_weights else config.vocab_size * width,
        "layers": config.num_layers * (attention + mlp + 2 * width),
        "routers": kvcat.num_groups * router,
        "norm": width,
    }
    return out | {"total": sum(out.values())}


def memory_per_gpu(config, layout: Layout) -> dict[str, int]:
    """Bytes on the fullest GPU in bf16 training, by part, and their `total`.

    Weights in bf16, gradients summed in float32, Adam's two moments and the float32 master weights (divided over
    data-parallel and context-parallel ranks by a distributed optimizer). Activations without recomputation: 34 bytes per token, channel and
    layer and pass. The loss holds a chunk's logits and the output weight's gradient in float32 (kernels.losses.token_loss).
    """
    parts = parameters(config)
    shard = layout.tensor * layout.pipeline
    layers = parts["layers"] / shard + parts["routers"] / layout.pipeline
    ends = (parts["embedding"] + parts["output"]) / layout.tensor
    if layout.pipeline > 1:
        ends = max(parts["embedding"], parts["output"] or parts["embedding"]) / layout.tensor
    local = layers + ends + parts["norm"]
    passes = 2 if config.kvcat.paired else 1
    tokens = layout.micro_batch_size * layout.seq_length / layout.context
    in_flight = min(layout.pipeline, layout.num_microbatches)  # micro-batches the first stage holds in 1F1B
    split = 34 / layout.tensor if layout.sequence_parallel else 10 + 24 / layout.tensor
    activations = (
        passes * tokens * config.hidden_size * split * config.num_layers / layout.pipeline * in_flight
    )
    loss = (
        config.kvcat.loss_memory_mib or LOSS_MEMORY_MIB["cuda"]
    ) * 2**20 + 4 * config.vocab_size * config.hidden_size / layout.tensor
    out = {
        "weights": 2 * local,
        "gradients": 4 * local,
        "optimizer": 12 * local / (layout.data * layout.context if layout.distributed_optimizer else 1),
        "activations": activations,
        "loss": loss,
    }
    out = {name: int(value) for name, value in out.items()}
    return out | {"total": sum(out.values())}


def flops_per_step(config, layout: Layout) -> float:
    """Forward and backward of every pass: 6 per weight and token, and 12·T·width/2 per layer and token of causal attention."""
    parts = parameters(config)
    weights = parts["total"] - parts["embedding"] + (parts["embedding"] if not parts["output"] else 0)
    attention = 6 * config.num_layers * layout.seq_length * config.num_attention_heads * config.kv_channels
    passes = 2 if config.kvcat.paired else 1
    return passes * (6.0 * weights + attention) * layout.global_batch_size * layout.seq_length
