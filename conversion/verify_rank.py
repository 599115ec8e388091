"""One rank of `verify`: loads checkpoints in their layouts and writes down what the Megatron model answers.

Run as `python -m kvcat_nemo.conversion.verify_rank JOBS.pt RANK WORLD_SIZE`. JOBS.pt holds a list of `RankJob`
fields; the first rank of the last pipeline stage writes answer-<i>.pt beside it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from kvcat_nemo.conversion.arch import Architecture


@dataclass(frozen=True)
class RankJob:
    """One checkpoint in one layout."""

    weights: str
    arch: Architecture
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    token_ids: tuple[int, ...]
    """The text that logits are wanted for."""
    prompt: int
    """Greedy decoding starts after this many of the tokens."""
    new_tokens: int
    precision: str = "float32"
    """"float32" or "float64": of the whole computation."""


def greedy(logits_of, token_ids: list[int], count: int) -> list[int]:
    """Decode `count` tokens; `logits_of(ids)` returns [T, V]. The whole text is fed anew for each one."""
    ids = list(token_ids)
    for _ in range(count):
        ids.append(int(logits_of(ids)[-1].argmax()))
    return ids[len(token_ids) :]


def _pipelined_logits(model, config, job: RankJob, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one text, known to every rank of the pipeline afterwards."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids))[None]
    hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)[None, None]
    kept = []

    def step(_, stage):
        out = stage(tokens, positions, hidden)
        return out, lambda logits: (kept.append(logits.detach()), (logits.new_zeros(()), {}))[1]

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=len(ids),
            micro_batch_size=1,
            forward_only=True,
        )
    vocab = job.arch.vocab_size
    # Megatron appends rows for the tensor parallel size; they are no part of the model.
    logits = torch.empty(len(ids), vocab, dtype=config.params_dtype)
    if kept:
        logits.copy_(kept[0][0, :, :vocab])
    torch.distributed.broadcast(
        logits,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return logits


def load_model(job: RankJob):
    """The GPTModel of this rank with the checkpoint's weights in it, and its config."""
    from megatron.core import dist_checkpointing

    from kvcat_nemo.conversion.arch import gpt_model, transformer_config
    from kvcat_nemo.conversion.dist_checkpoint import CheckpointReader
    from kvcat_nemo.conversion.exporting import model_prefix

    config = transformer_config(
        job.arch,
        tensor_model_parallel_size=job.tensor_model_parallel_size,
        pipeline_model_parallel_size=job.pipeline_model_parallel_size,
        dtype=getattr(torch, job.precision),
    )
    model = gpt_model(job.arch, config).eval()
    prefix = model_prefix(CheckpointReader(job.weights))
    state = dist_checkpointing.load(model.sharded_state_dict(prefix=prefix), job.weights)
    model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return model, config


def _answer(job: RankJob) -> dict:
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(job.tensor_model_parallel_size, job.pipeline_model_parallel_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model, config = load_model(job)

    def logits_of(ids):
        return _pipelined_logits(model, config, job, ids)

    ids = list(job.token_ids)
    answer = {
        "logits": logits_of(ids),
        "decoded": greedy(logits_of, ids[: job.prompt], job.new_tokens),
    }
    parallel_state.destroy_model_parallel()
    return answer


def _die_with_parent(parent: int) -> None:
    # A killed parent cannot end its ranks; none may stay behind waiting for the others.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(jobs_file: str, rank: int, world_size: int, timeout: float) -> None:
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    from kvcat_nemo.engine import hardware

    hardware.enable()
    if hardware.is_cuda():
        torch.cuda.set_device(rank)
    folder = Path(jobs_file).parent
    jobs = torch.load(jobs_file, weights_only=False)  # written by the parent of this process
    # Megatron reads a checkpoint's common.pt and objects with torch.load: tensors and plain values, whatever the user's
    # environment allows elsewhere. (Its index was looked at by CheckpointReader.)
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    # A file in a private folder instead of a port: nothing can collide or be in use.
    torch.distributed.init_process_group(
        hardware.process_group_backend(),
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    for number, job in enumerate(jobs):
        answer = _answer(job)
        if rank == world_size - 1:
            torch.save(answer, folder / f"answer-{number}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
