"""Rank program of test_megatron: loads imported checkpoints with Megatron's own code, "trains" and saves.

python save_ranks.py SPEC.json RANK WORLD_SIZE. Training is replaced by doubling every parameter: exact in any
floating point type, so that what is exported must be exactly twice the imported model.
"""

import json
import sys
from pathlib import Path

import torch


def main(spec_file, rank, world_size):
    from kvcat_nemo.engine import hardware

    hardware.enable()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from kvcat_nemo.conversion.arch import gpt_model, load_architecture, transformer_config

    spec = json.loads(Path(spec_file).read_text())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{spec_file}.rendezvous", rank=rank, world_size=world_size
    )
    for job in spec:
        tp, pp = job["tp"], job["pp"]
        parallel_state.initialize_model_parallel(tp, pp)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        arch = load_architecture(job["imported"])
        config = transformer_config(arch, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        plain = gpt_model(arch, config)
        # NeMo's prefix: the imported checkpoint must answer to it too.
        prefix = job["prefix"]
        state = dist_checkpointing.load(plain.sharded_state_dict(prefix=prefix), job["imported"] + "/weights")
        plain.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()})
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), plain)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.0, params_dtype=torch.float32), [model]
        )
        model.zero_grad_buffer()
        optimizer.step()  # creates the optimizer's state; gradients and weight decay are zero
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                parameter.mul_(2)
                if "word_embeddings" in name or "output_layer" in name:
                    # Padding rows that would be seen if they leaked.
                    first = parallel_state.get_tensor_model_parallel_rank() * parameter.shape[0]
                    parameter[max(0, arch.vocab_size - first) :] = 7.0
        weights = plain.sharded_state_dict(prefix=prefix)
        everything = {"model": dict(weights), "optimizer": optimizer.sharded_state_dict(weights)}
        if rank == 0:
            for key in ("decoder.layers.router.weight", "decoder.routers.0.proj.weight"):
                everything["model"][key] = ShardedTensor.from_rank_offsets(prefix + key, torch.ones(2, 4, 64))
        Path(job["out"]).mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(everything, job["out"])
        parallel_state.destroy_model_parallel()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # the checkpoint writer spawns
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
