"""Dense perplexity of a converted model under the layers that training builds, against transformers'.

Rank program: `python -m kvcat_nemo.doctor.perplexity JOB`, one process on one device.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kvcat_nemo.common.processes import die_with_parent
from kvcat_nemo.doctor.ranks import RanksFailed, environment, tail
from kvcat_nemo.doctor.weights import load_weights
from kvcat_nemo.runs.layout import WEIGHTS

WINDOWS, TOKENS = 4, 256


def compare_perplexity(
    hf: Path, base: Path, device: str, folder: Path, timeout: float = 600.0
) -> dict[str, float]:
    """{"log perplexity", "transformers" (its log perplexity), "mean KL" (transformers ‖ ours, nats a token), "tokens"}.

    Of the model's text where the folder has a tokenizer (conversion.verify.TEXT), else of random tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = token_ids(hf)
    path = folder / f"{base.name}-{base.parent.name}.pt"
    torch.save({"base": str(base), "ids": ids}, path)
    log = path.with_suffix(".log")
    with log.open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "kvcat_nemo.doctor.perplexity", str(path)],
            env=environment(device),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            preexec_fn=die_with_parent,
        )
    if done.returncode:
        raise RanksFailed(f"the converted model ended with {done.returncode}; its log ends:\n{tail(log)}")
    ours = torch.load(path.with_suffix(".logits")).double().log_softmax(-1)
    theirs = transformers_logits(hf, ids, device).double().log_softmax(-1)
    labels = ids[:, 1:, None]
    out = {
        name: -float(x[:, :-1].gather(-1, labels).mean())
        for name, x in (("log perplexity", ours), ("transformers", theirs))
    }
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    return out | {"mean KL": float(kl), "tokens": float(labels.numel())}


def token_ids(hf: Path) -> torch.Tensor:
    """[windows, tokens]."""
    from kvcat_nemo.conversion.arch import load_architecture
    from kvcat_nemo.tokens import document_ids, has_tokenizer, load

    arch = load_architecture(hf)
    tokens = min(TOKENS, arch.seq_length)
    if has_tokenizer(hf):
        from kvcat_nemo.conversion.verify import TEXT

        return torch.tensor([document_ids(load(hf), TEXT)[:tokens]])
    return torch.randint(arch.vocab_size, (WINDOWS, tokens), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def transformers_logits(hf: Path, ids: torch.Tensor, device: str) -> torch.Tensor:
    """[windows, tokens, V], float32."""
    from kvcat_nemo.models.load import load_causal_lm

    model = load_causal_lm(hf, torch.float32, attn_implementation="eager")
    return model.to(device)(ids.to(device), use_cache=False).logits.float().cpu()


@torch.no_grad()
def main(job_file: str) -> None:
    """Write the logits of the job's windows beside it: training's layers and kernels, in bf16."""
    from kvcat_nemo.engine import hardware

    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    from kvcat_nemo.conversion.arch import apply_rope, load_architecture, transformer_config
    from kvcat_nemo.engine.config_checks import KVCatTransformerConfig, validate_model_config
    from kvcat_nemo.engine.paired_model import KVCatGPTModel
    from kvcat_nemo.engine.spec import has_transformer_engine, kvcat_block_spec
    from kvcat_nemo.method.config import KVCatConfig

    job: dict[str, Any] = torch.load(job_file, weights_only=True)
    torch.distributed.init_process_group(
        hardware.process_group_backend(), init_method=f"file://{job_file}.rendezvous", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    base = Path(job["base"])
    arch = load_architecture(base)
    plain = transformer_config(arch, dtype=torch.bfloat16, apply_rope_fusion=has_transformer_engine())
    fields = {
        name: getattr(plain, name)
        for name in KVCatTransformerConfig.__dataclass_fields__
        if hasattr(plain, name)
    }
    config = KVCatTransformerConfig(**fields | {"kvcat": KVCatConfig(policy="none", num_groups=1)})
    validate_model_config(config)
    model = KVCatGPTModel(
        config,
        transformer_layer_spec=kvcat_block_spec(config),
        vocab_size=arch.vocab_size,
        max_sequence_length=arch.seq_length,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,
        share_embeddings_and_output_weights=arch.tied,
        parallel_output=False,
    )
    apply_rope(model, arch)
    model.to(hardware.device()).to(torch.bfloat16).eval()
    load_weights(model, base / WEIGHTS)
    ids = job["ids"].to(hardware.device())
    place = torch.arange(ids.shape[1], device=ids.device).expand(*ids.shape)
    torch.save(model(ids, place).float().cpu(), Path(job_file).with_suffix(".logits"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
