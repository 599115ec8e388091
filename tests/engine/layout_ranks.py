"""Rank program of the parallel matrix: python -m tests.engine.layout_ranks JOBS.json RANK WORLD_SIZE.

Each job trains a case of matrix_cases from the checkpoint that its reference job saved, and compares every gradient on
this rank with the reference's, which are stored as a checkpoint of their own: Megatron's loader cuts them as it cuts the
weights.
"""

import gc
import json
import math
import sys
from pathlib import Path

import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.bfloat16}


def main(jobs_file, rank, world_size):
    from kvcat_nemo.engine import hardware

    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    jobs = json.loads(Path(jobs_file).read_text())
    for number, job in enumerate(jobs):
        # Anew for each job: Megatron never ends its groups, and gloo's threads of some hundred groups stand still.
        rendezvous = f"file://{jobs_file}.rendezvous-{number}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        layout = job.get("layout", {})
        parallel_state.initialize_model_parallel(
            layout.get("tp", 1),
            layout.get("pp", 1),
            layout.get("vp"),
            context_parallel_size=layout.get("cp", 1),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        result = strided_gradient() if job.get("trap") else train(job)
        torch.save(result, f"{jobs_file}.{number}.{rank}.pt")
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()  # models hold groups, and a group's threads end with its last reference


def strided_gradient():
    """∂(Σ_ranks Σ gate·weight) by Megatron's copy and by ours, when the gradient comes as a strided view."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from kvcat_nemo.engine.collectives import copy_to_tensor_parallel

    group = parallel_state.get_tensor_model_parallel_group()
    weight = torch.arange(6.0).view(3, 2) + 10 * group.rank()
    out = {}
    for name, copy in (
        ("megatron", copy_to_tensor_model_parallel_region),
        ("ours", lambda x: copy_to_tensor_parallel(x, group)),
    ):
        gate = torch.ones(2, 3, requires_grad=True)
        (copy(gate).t() * weight).sum().backward()
        out[name] = gate.grad.clone()
    return out


def train(job):
    """Optimizer steps of a case, and a last forward and backward whose gradients are compared."""
    from megatron.core import parallel_state

    from kvcat_nemo.engine.grad_norm import gradient_norms
    from tests.engine.small_models import enliven, microbatches, recorded_masks, train_step

    recipe, layout, options = job["recipe"], job["layout"], job["options"]
    models, chunks, config = build_chunks(recipe, layout, options, job.get("unchecked"))
    weights, gradients = f"{job['folder']}/weights", f"{job['folder']}/gradients"
    if job["reference"]:
        enliven(models[0])
        save(models[0], weights)
    else:
        for model, state in zip(models, load(models, weights), strict=True):
            model.load_state_dict(state)
    updates = recipe.get("updates", 0)
    optimizer = make_optimizer(recipe, options, config, chunks) if updates else None
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    cp, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    length = recipe.get("tokens", 8)
    held = None if cp == 1 else held_tokens(length, cp, cp_rank)
    figures = []
    with recorded_masks(chunks) as masks:
        for step in range(updates + 1):
            batch = microbatches(step, length, recipe.get("windows", 2), recipe.get("micro", 4))
            if recipe.get("all_tokens"):
                batch = [(tokens, labels, torch.ones_like(mask)) for tokens, labels, mask in batch]
            figures.append(train_step(chunks, config, dp_rank, dp, batch, held, recipe.get("packed", False)))
            if step < updates:
                assert optimizer.step()[0]
                optimizer.zero_grad()  # or the next gradients would be added to these, which are the DDP wrapper's buffer
    norms = gradient_norms(chunks)
    if options.get("dist_opt"):
        gather_shares(chunks)
    result = {"figures": figures, "norms": norms, "masks": masks, "dp_rank": dp_rank, "dp": dp, "held": held}
    result["tp_rank"] = parallel_state.get_tensor_model_parallel_rank()
    measured = [{name: p.main_grad.clone() for name, p in model.named_parameters()} for model in models]
    if job["reference"]:
        squares = {True: 0.0, False: 0.0}
        for name, parameter in models[0].named_parameters():
            grad = measured[0][name]
            squares[getattr(parameter, "is_router", False)] += float(grad.double().square().sum())
            parameter.data = grad
        save(models[0], gradients)
        return result | {"plain_norms": {k: math.sqrt(v) for k, v in squares.items()}}
    for model, grads in zip(models, measured, strict=True):
        for name, parameter in model.named_parameters():  # their dtype, for the loader
            parameter.data = torch.zeros_like(grads[name])
    result["errors"] = {}
    for model, grads, expected in zip(models, measured, load(models, gradients), strict=True):
        for name, grad in grads.items():
            theirs = expected[name].to(grad)
            scale = float(theirs.abs().max())
            error = float((grad / options.get("loss_scale", 1) - theirs).abs().max())
            offset = model.decoder.layers[0].layer_number - 1
            result["errors"][f"{offset}+{name}"] = (error, scale)
    return result


def build_chunks(recipe, layout, options, unchecked=False):
    """This rank's model chunks, bare and in Megatron's DDP wrapper, and their configuration."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from kvcat_nemo.engine.config_checks import validate_model_config
    from tests.engine.small_models import MODELS, VOCAB, build, transformer_config

    half = {"bf16": True} if recipe.get("dtype") == "bf16" else {}
    config = transformer_config(
        recipe["model"],
        kvcat=recipe.get("kvcat"),
        dtype=DTYPES[recipe.get("dtype", "float64")],
        tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1),
        virtual_pipeline_model_parallel_size=layout.get("vp"),
        context_parallel_size=layout.get("cp", 1),
        sequence_parallel=layout.get("sp", False),
        **half | recipe.get("fields", {}) | options.get("recompute", {}) | options.get("config", {}),
    )
    if not unchecked:  # a test shows what a refusal spares
        validate_model_config(config)
    factor = options.get("loss_scale", 1)
    if factor != 1:
        config.grad_scale_func = lambda loss: loss * factor
    tied, tp = MODELS[recipe["model"]][2], layout.get("tp", 1)
    stages = range(layout["vp"]) if layout.get("vp") else [None]
    # Padded as a run pads it: to a multiple of the ranks, which 101 tokens are for none but one.
    size = {"padded_vocab": -(-VOCAB // tp) * tp, "max_tokens": recipe.get("tokens", 8)}
    models = [build(config, tied, stage, **size) for stage in stages]
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=options.get("dist_opt", False),
        overlap_grad_reduce=options.get("overlap_grad", False),
        overlap_param_gather=options.get("overlap_param", False),
        align_param_gather=options.get("align", False),
        grad_reduce_in_fp32=bool(half),
        bucket_size=500
        if options.get("overlap_grad")
        else None,  # several buckets, to overlap with one another
    )
    wrapped = [Float16Module(config, model) for model in models] if half else models
    chunks = [DistributedDataParallel(config, settings, model) for model in wrapped]
    # As Megatron's and NeMo's training set them.
    one = lambda functions: functions if len(functions) > 1 else functions[0]  # noqa: E731
    if options.get("overlap_grad"):
        config.no_sync_func = one([chunk.no_sync for chunk in chunks])
        if options.get("align"):
            config.grad_sync_func = one([chunk.start_grad_sync for chunk in chunks])
    if options.get("overlap_param") and options.get("align"):
        config.param_sync_func = one([chunk.start_param_sync for chunk in chunks])
    return models, chunks, config


def make_optimizer(recipe, options, config, chunks):
    """Megatron's AdamW. Its clipping and its distributed form know no float64."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    double = recipe.get("dtype", "float64") == "float64"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.003,
        weight_decay=0.01,
        adam_beta2=0.95,
        clip_grad=0.0 if double else 1.0,
        bf16=bool(config.bf16),
        params_dtype=config.params_dtype,
        use_distributed_optimizer=options.get("dist_opt", False),
    )
    return get_megatron_optimizer(settings, chunks)


def held_tokens(length, ranks, rank):
    """Tokens of every window that a rank of context parallelism holds: Megatron's order, which balances causal attention."""
    parts = torch.arange(length).chunk(2 * ranks)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])


def save(model, folder):
    from megatron.core import dist_checkpointing

    Path(folder).mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(), folder)


def load(models, folder):
    """State of every chunk of this rank. In one call: Megatron checks that the ranks' chunks make up the whole."""
    from megatron.core import dist_checkpointing

    wanted = {str(i): model.sharded_state_dict() for i, model in enumerate(models)}
    return list(dist_checkpointing.load(wanted, folder).values())


def gather_shares(chunks):
    """Under the distributed optimizer a rank holds the sums of its share of each bucket alone: fetch the others'."""
    for chunk in chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                share = bucket.grad_data.view(buffer.data_parallel_world_size, -1)
                shares = [torch.empty_like(share[0]) for _ in share]
                mine = share[buffer.data_parallel_group.rank()].clone()
                torch.distributed.all_gather(shares, mine, group=buffer.data_parallel_group)
                share.copy_(torch.stack(shares))


if __name__ == "__main__":  # the checkpoint writer spawns
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
