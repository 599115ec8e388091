"""Rank program of test_layouts: python layout_ranks.py JOBS.json RANK WORLD_SIZE.

Each job runs one training step of a model at a layout, from the checkpoint that the reference job saved, and compares
every gradient on this rank with the reference's, which are stored as a checkpoint of their own: Megatron's loader
cuts them as it cuts the weights.
"""

import gc
import json
import math
import sys
from pathlib import Path

import torch


def main(jobs_file, rank, world_size):
    from kvcat_nemo.engine import host

    host.enable()
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    jobs = json.loads(Path(jobs_file).read_text())
    results = []
    for number, job in enumerate(jobs):
        # Anew for each job: Megatron never ends its groups, and gloo's threads of some hundred groups stand still.
        rendezvous = f"file://{jobs_file}.rendezvous-{number}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        layout = job["layout"]
        parallel_state.initialize_model_parallel(layout.get("tp", 1), layout.get("pp", 1), layout.get("vp"))
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        results.append(strided_gradient() if job["model"] == "trap" else train(job))
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()  # models hold groups, and a group's threads end with its last reference
    torch.save(results, f"{jobs_file}.{rank}.pt")


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
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from small_models import MODELS, build, enliven, record_gates, train_step, transformer_config

    from kvcat_nemo.engine.config import validate_model_config
    from kvcat_nemo.engine.grad_norm import gradient_norms

    layout = job["layout"]
    tied = MODELS[job["model"]][2]
    stages = layout.get("vp") or 1
    config = transformer_config(
        job["model"],
        kvcat=job.get("kvcat"),
        tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1),
        virtual_pipeline_model_parallel_size=layout.get("vp"),
        sequence_parallel=layout.get("sp", False),
        **layout.get("recompute", {}),
    )
    validate_model_config(config)
    factor = layout.get("loss_scale", 1)
    if factor != 1:
        config.grad_scale_func = lambda loss: loss * factor
    models = [build(config, tied, i if stages > 1 else None) for i in range(stages)]
    weights, gradients = f"{job['folder']}/weights", f"{job['folder']}/gradients"
    if job["reference"]:
        enliven(models[0])
        save(models[0], weights)
    else:
        for model, state in zip(models, load(models, weights), strict=True):
            model.load_state_dict(state)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=layout.get("dist_opt", False))
    chunks = [DistributedDataParallel(config, settings, model) for model in models]
    gates = record_gates(chunks)
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    figures = train_step(chunks, config, dp_rank, dp)
    norms = gradient_norms(chunks)
    if layout.get("dist_opt"):
        gather_shares(chunks)
    result = {"figures": figures, "norms": norms, "gates": gates, "dp_rank": dp_rank, "dp": dp}
    if job["reference"]:
        squares = {True: 0.0, False: 0.0}
        for parameter in models[0].parameters():
            squares[getattr(parameter, "is_router", False)] += float(parameter.main_grad.square().sum())
            parameter.data = parameter.main_grad.clone()
        save(models[0], gradients)
        return result | {"plain_norms": {k: math.sqrt(v) for k, v in squares.items()}}
    result["errors"] = {}
    for model, expected in zip(models, load(models, gradients), strict=True):
        for name, parameter in model.named_parameters():
            scale = float(expected[name].abs().max())
            error = float((parameter.main_grad / factor - expected[name]).abs().max())
            offset = model.decoder.layers[0].layer_number - 1
            result["errors"][f"{offset}+{name}"] = (error, scale)
    return result


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
