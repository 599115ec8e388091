"""Rank program: python kvdistill_ranks.py JOBS.json RANK WORLD_SIZE. Trains a step at a layout and compares every gradient.

Reference jobs, of one process, save weights and gradients as checkpoints; the others load both, cut as Megatron cuts them.
"""

import gc
import json
import sys
from pathlib import Path

import torch


def main(jobs_file, rank, world_size):
    from kvcat_nemo.engine import hardware

    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    for number, job in enumerate(json.loads(Path(jobs_file).read_text())):
        rendezvous = f"file://{jobs_file}.rendezvous-{number}"
        torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        parallel_state.initialize_model_parallel(job["layout"].get("tp", 1), job["layout"].get("pp", 1))
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        torch.save(train(job), f"{jobs_file}.{number}.{rank}.pt")
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        gc.collect()  # models hold groups, and a group's threads end with its last reference


def train(job):
    """Figures of a step, and by parameter (largest error, largest gradient)."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from tests.engine.kvdistill_models import distill_config, model_of, train_step
    from tests.engine.layout_ranks import load, save

    layout = job["layout"]
    model = model_of(
        distill_config(**job["distill"]),
        padded_vocab=102,
        tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1),
        sequence_parallel=layout.get("sp", False),
        **job["fields"],
    )
    weights, gradients = f"{job['folder']}/weights", f"{job['folder']}/gradients"
    if job["reference"]:
        save(model, weights)
    else:
        model.load_state_dict(load([model], weights)[0])
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    figures = train_step(model, ddp, dp_rank, dp)
    measured = {name: p.main_grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert measured and not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    for name, parameter in model.named_parameters():
        parameter.data = measured.get(name, torch.zeros_like(parameter.data))
    if job["reference"]:
        save(model, gradients)
        return {"figures": figures, "errors": {}}
    expected = load([model], gradients)[0]
    offset = model.decoder.layers[0].layer_number - 1
    errors = {
        f"{offset}+{name}": (float((grad - expected[name]).abs().max()), float(expected[name].abs().max()))
        for name, grad in measured.items()
    }
    return {"figures": figures, "errors": errors}


if __name__ == "__main__":  # the checkpoint writer spawns
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
