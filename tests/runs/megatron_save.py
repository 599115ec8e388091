"""Saves a small model and its optimizer's state with Megatron's own writer: python -m tests.runs.megatron_save FOLDER"""

import sys
import tempfile
from pathlib import Path

import torch


def main(out):
    from kvcat_nemo.engine import hardware

    hardware.enable()
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from kvcat_nemo.conversion.arch import from_hf_config, gpt_model, transformer_config
    from tests.runs.run_models import CONFIG

    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/r", rank=0, world_size=1)
        parallel_state.initialize_model_parallel(1, 1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        arch = from_hf_config(CONFIG)
        config = transformer_config(arch)
        plain = gpt_model(arch, config)
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), plain)
        settings = OptimizerConfig(optimizer="adam", lr=1e-3, params_dtype=torch.float32)
        optimizer = get_megatron_optimizer(settings, [model])
        model.zero_grad_buffer()
        optimizer.step()
        weights = plain.sharded_state_dict(prefix="module.")
        Path(out).mkdir(parents=True)
        state = {"model": dict(weights), "optimizer": optimizer.sharded_state_dict(weights), "iteration": 5}
        dist_checkpointing.save(state, out)
        torch.distributed.destroy_process_group()


if __name__ == "__main__":  # the checkpoint writer starts processes
    main(sys.argv[1])
