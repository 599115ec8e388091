"""A paired training run on plain Megatron-core, without NeMo: what the doctor trains on GPUs and, as reference, on the CPU.

Rank program: `python -m kvcat_nemo.doctor.training JOBS RANK WORLD_SIZE`. A job is a dict over `DEFAULTS`; its result has the
figures of every step, the first masks, times and memory. The same module runs on either host and in any layout.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kvcat_nemo.doctor.weights import load_weights

VOCAB = 503
"""A prime: padded in every layout but one process'."""

DEFAULTS: dict[str, Any] = {
    "layers": 4,
    "hidden": 256,
    "head_dim": 64,
    "heads": 4,
    "kv_heads": 2,
    "tied": True,
    "policy": "router",
    "tokens": 256,
    "windows": 2,
    "micro": 2,
    "steps": 10,
    "lr": 1e-4,
    "dtype": "bf16",
    "tp": 1,
    "pp": 1,
    "cp": 1,
    "distributed": True,
    "overlap": True,
    "average": False,
    "bucket": None,
    "memory_efficient": False,
    "start": None,  # folder of the weights that all layouts and hosts begin with; written by the job that has make_start
    "make_start": False,
    "load": None,  # checkpoint to go on from: weights and optimizer
    "save": None,
    "save_again": None,  # right after loading: what was read, in this layout
    "first_step": 0,
    "profile": False,
}


def windows_of(step: int, job: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A step's global batch, the same in every layout: (tokens, labels, loss mask) per micro-batch.

    The second half of each window repeats the first, so that the masked slots are worth something.
    """
    rng = torch.Generator().manual_seed(1000 + step)
    out = []
    for _ in range(job["micro"]):
        half = torch.randint(0, VOCAB, (job["windows"], job["tokens"] // 2 + 1), generator=rng)
        text = torch.cat([half, half], 1)[:, : job["tokens"] + 1]
        out.append((text[:, :-1], text[:, 1:], torch.ones(job["windows"], job["tokens"])))
    return out


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job on this rank; Megatron's parallel state is there."""
    from megatron.core import parallel_state

    from kvcat_nemo.engine.grad_norm import gradient_norms
    from kvcat_nemo.engine.hardware import is_cuda

    model, chunk, config = build(job)
    _start(job, model)
    optimizer = _optimizer(job, config, chunk)
    if job["load"]:
        load(job, model, optimizer)
    if job["save_again"]:
        save(job, model, optimizer, job["save_again"])
    masks = _FirstMasks(model)
    figures, seconds, counted = [], [], None
    steps = range(job["first_step"], job["first_step"] + job["steps"])
    for step in steps:
        if is_cuda():
            torch.cuda.synchronize()
        began = time.perf_counter()
        last = job["profile"] and step == steps[-1]
        with _profiler() if last else contextlib.nullcontext() as profiled:
            line = _step(job, config, chunk, step)
            line |= {f"grad_norm/{name}": value for name, value in gradient_norms([chunk]).items()}
            updated = optimizer.step()[0]
            optimizer.zero_grad()
            if is_cuda():
                torch.cuda.synchronize()
        if last:
            counted = counts(profiled)
        if not updated:
            raise RuntimeError(f"step {step}: the optimizer left the update out")
        seconds.append(time.perf_counter() - began)
        figures.append(line)
        masks.end()
    if job["save"]:
        save(job, model, optimizer, job["save"])
    return {
        "figures": figures,
        "seconds": seconds,
        "masks": masks.taken,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda() else 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "counts": counted,
        "fused": {
            name: bool(getattr(config, name))
            for name in ("gradient_accumulation_fusion", "apply_rope_fusion")
        },
        "tp_rank": parallel_state.get_tensor_model_parallel_rank(),
    }


def build(job: dict[str, Any]):
    """This rank's model, the model in Megatron's wrappers, and the configuration."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from kvcat_nemo.engine.config_checks import KVCatTransformerConfig, validate_model_config
    from kvcat_nemo.engine.hardware import is_cuda
    from kvcat_nemo.engine.paired_model import KVCatGPTModel
    from kvcat_nemo.engine.spec import has_transformer_engine, kvcat_block_spec
    from kvcat_nemo.method.config import KVCatConfig

    half = job["dtype"] == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    fused = has_transformer_engine()
    config = KVCatTransformerConfig(
        num_layers=job["layers"],
        hidden_size=job["hidden"],
        ffn_hidden_size=2 * job["hidden"],
        num_attention_heads=job["heads"],
        num_query_groups=job["kv_heads"],
        kv_channels=job["head_dim"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=half,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=job["tp"],
        pipeline_model_parallel_size=job["pp"],
        context_parallel_size=job["cp"],
        sequence_parallel=job["tp"] > 1,
        use_cpu_initialization=not is_cuda(),
        gradient_accumulation_fusion=is_cuda() and _fuses_gradients(),
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        kvcat=KVCatConfig(
            policy=job["policy"], num_groups=2, router_dim=16, router_init_keep=0.51, router_init_jitter=1.0
        ),
    )
    validate_model_config(config)
    model = KVCatGPTModel(
        config,
        transformer_layer_spec=kvcat_block_spec(config),
        vocab_size=-(-VOCAB // job["tp"]) * job["tp"],
        true_vocab_size=VOCAB,
        max_sequence_length=job["tokens"],
        position_embedding_type="rope",
        share_embeddings_and_output_weights=job["tied"],
        parallel_output=True,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    if is_cuda():
        model.cuda()
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=job["distributed"],
        overlap_grad_reduce=job["overlap"],
        overlap_param_gather=job["overlap"] and job["distributed"],
        average_in_collective=job["average"],
        grad_reduce_in_fp32=True,
        bucket_size=job["bucket"],
    )
    chunk = DistributedDataParallel(config, settings, Float16Module(config, model) if half else model)
    if job["overlap"]:
        config.no_sync_func = chunk.no_sync
    return model, chunk, config


def _fuses_gradients() -> bool:
    """Whether apex's extension is there, which Megatron's own linear layers add gradients with (or Transformer Engine)."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _start(job: dict[str, Any], model) -> None:
    from megatron.core import dist_checkpointing

    if job["make_start"]:
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2 and ".router." not in name:
                    noise = torch.randn(parameter.shape, generator=rng)
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)
        Path(job["start"]).mkdir(parents=True)
        dist_checkpointing.save(model.sharded_state_dict(), job["start"])
    elif job["start"]:
        load_weights(model, job["start"])


def _optimizer(job: dict[str, Any], config, chunk):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = OptimizerConfig(
        optimizer="adam",
        lr=job["lr"],
        weight_decay=0.01,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=bool(config.bf16),
        params_dtype=config.params_dtype,
        use_distributed_optimizer=job["distributed"],
        overlap_param_gather=job["overlap"] and job["distributed"],
    )
    return get_megatron_optimizer(settings, [chunk])


def _step(job: dict[str, Any], config, chunk, step: int) -> dict[str, float]:
    """Forward and backward of a global batch by Megatron's schedule; named figures."""
    from megatron.core import parallel_state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_batch_on_this_cp_rank

    from kvcat_nemo.engine import hardware
    from kvcat_nemo.engine.collectives import set_router_loss_scale
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = windows_of(step, job)[dp_rank::dp]
    config.finalize_model_grads_func = finalize_model_grads
    place = torch.arange(job["tokens"]).expand(job["windows"], -1)

    def forward_step(iterator, model):
        tokens, labels, mask = next(iterator)
        set_router_loss_scale(config, len(mine))
        batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "position_ids": place.contiguous()}
        batch = get_batch_on_this_cp_rank({name: x.to(hardware.device()) for name, x in batch.items()})
        out = model(
            batch["tokens"],
            batch["position_ids"],
            None,
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        return out, lambda metrics: microbatch_loss(metrics, batch["loss_mask"], config.kvcat)

    chunk.zero_grad_buffer()
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(mine),
        model=[chunk],
        num_microbatches=len(mine),
        seq_length=job["tokens"],
        micro_batch_size=job["windows"] * (2 if config.kvcat.paired else 1),
        forward_only=False,
    )
    return step_metrics(sums, [chunk], config.kvcat, device=hardware.device())


def content(job: dict[str, Any]) -> dict[str, Any]:
    """Which form an optimizer's state is saved in: as NeMo's strategy says of a recipe's."""
    out = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if job["distributed"]:
        out |= {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": job["memory_efficient"],
        }
    return out


def save(job: dict[str, Any], model, optimizer, folder: str) -> None:
    """Weights and optimizer of all ranks."""
    from megatron.core import dist_checkpointing

    # Pages are freed by the first rank's writer alone: all must have left the previous step.
    torch.distributed.barrier()
    Path(folder).mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=content(job))}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=content(job))
    dist_checkpointing.save(state, folder, content_metadata=content(job))


def load(job: dict[str, Any], model, optimizer) -> None:
    """Weights and optimizer, whatever layout wrote them."""
    from megatron.core import dist_checkpointing

    metadata = dist_checkpointing.load_content_metadata(job["load"])
    state: dict[str, Any] = {"model": model.sharded_state_dict(metadata=metadata)}
    state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=True, metadata=metadata)
    loaded = dist_checkpointing.load(state, job["load"])
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


class _FirstMasks:
    """Keep probabilities of every router on the first micro-batch of the first step, [B, T] float32 on the CPU."""

    def __init__(self, model):
        self.taken: dict[int, torch.Tensor] = {}
        self._done = False
        for module in model.modules():
            router = getattr(module, "router", None)
            if router is not None and hasattr(module, "group"):
                router.register_forward_hook(
                    lambda _, __, routing, group=module.group: self._take(group, routing)
                )

    def _take(self, group: int, routing) -> None:
        if not self._done and group not in self.taken:
            self.taken[group] = routing.p_BT.detach().float().cpu()

    def end(self) -> None:
        self._done = True


def _profiler():
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def counts(profiled) -> dict[str, int]:
    """Kernel launches and host syncs of what was profiled; without CUDA operators in place of launches."""
    events = profiled.events()
    names = [event.name for event in events]
    out = {
        "launches": sum(name in LAUNCHES for name in names),
        "syncs": sum(name in SYNCS for name in names),
        "operators": sum(name.startswith("aten::") for name in names),
        "items": sum(name in ("aten::_local_scalar_dense", "aten::nonzero") for name in names),
    }
    return out


def main(jobs_file: str, rank: int, world_size: int) -> None:
    from kvcat_nemo.engine import hardware
    from kvcat_nemo.engine.compat.distributed_optimizer import patch_distributed_optimizer

    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    patch_distributed_optimizer()
    if hardware.is_cuda():
        torch.cuda.set_device(rank)
        torch.backends.cuda.matmul.allow_tf32 = False
    for number, given in enumerate(torch.load(jobs_file, weights_only=False)):  # written by the parent
        job = DEFAULTS | given
        # Anew for each job: Megatron never ends its groups.
        torch.distributed.init_process_group(
            hardware.process_group_backend(),
            init_method=f"file://{jobs_file}.rendezvous-{number}",
            rank=rank,
            world_size=world_size,
        )
        parallel_state.initialize_model_parallel(job["tp"], job["pp"], context_parallel_size=job["cp"])
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        torch.save(run(job), f"{jobs_file}.{number}.{rank}")
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()


if __name__ == "__main__":  # the checkpoint writer spawns
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
