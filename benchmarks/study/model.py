"""The model on the engine's side: made in a single process, filled from a checkpoint, saved and exported."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from benchmarks.study.scales import Shape
from kvcat_nemo.engine import hardware


def write_untrained(tokenizer: Path, shape: Shape, out: Path, seed: int) -> Path:
    """A random Llama of the shape as a Hugging Face folder with tokenizer: what the base model starts from."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcat_nemo.common.folders import new_folder
    from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest, listed_names
    from kvcat_nemo.tokens import load

    words = load(tokenizer)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.tokens,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            bos_token_id=words.eos_token_id,
            eos_token_id=words.eos_token_id,
        )
    )
    with new_folder(out, listed_names) as folder:
        model.save_pretrained(folder)
        words.save_pretrained(folder)
        hash_and_write_manifest(folder, kind="untrained")
    return out


def start_process() -> None:
    """A process group of one, which Megatron's modules ask for."""
    import torch

    hardware.enable()
    from megatron.core import parallel_state, tensor_parallel

    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def build(converted: Path, kvcat: dict, seed: int, precision: str = "float32"):
    """The paired model with the weights of a converted folder; routers are drawn from the seed.

    Args:
        precision: `float32`, or `bf16`: weights and products in bf16, routers in float32.

    Returns:
        The bare model, and the module that trains: the same, or Megatron's wrapper around it for bf16.
    """
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.module import Float16Module

    from kvcat_nemo.conversion.arch import apply_rope, load_architecture, transformer_config
    from kvcat_nemo.conversion.dist_checkpoint import CheckpointReader
    from kvcat_nemo.conversion.exporting import model_prefix
    from kvcat_nemo.engine.config_checks import KVCatTransformerConfig, validate_model_config
    from kvcat_nemo.engine.paired_model import KVCatGPTModel
    from kvcat_nemo.engine.spec import kvcat_block_spec
    from kvcat_nemo.method.config import KVCatConfig

    arch = load_architecture(converted)
    plain = transformer_config(arch)
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain) if f.init}
    if precision == "bf16":
        fields |= {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    config = KVCatTransformerConfig(**fields, kvcat=KVCatConfig(**kvcat, seed=seed))
    validate_model_config(config)
    torch.manual_seed(seed)
    model = KVCatGPTModel(
        config,
        kvcat_block_spec(config),
        vocab_size=arch.vocab_size,
        max_sequence_length=arch.seq_length,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,
        share_embeddings_and_output_weights=arch.tied,
    )
    apply_rope(model, arch)
    weights = str(converted / "weights")
    prefix = model_prefix(CheckpointReader(Path(weights)))
    backbone = {k: v for k, v in model.sharded_state_dict(prefix=prefix).items() if ".router." not in k}
    state = dist_checkpointing.load(backbone, weights)
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    strange = [name for name in missing if ".router." not in name] + list(unexpected)
    if strange:
        raise ValueError(f"{converted} does not hold the model's {strange[:3]}")
    if precision == "bf16":
        return model, Float16Module(config, model)
    return model, model


def export(model, template: Path, out: Path) -> None:
    """The plain Hugging Face model, routers left out, by the project's own converter.

    Args:
        template: a folder of the same architecture, whose configuration and tokenizer are taken.
    """
    from kvcat_nemo.conversion.exporting import export_hf

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        weights = Path(folder) / "weights"
        weights.mkdir()
        _write(model, weights)
        export_hf(weights, out, base=template, force=True, unverified=True)


def _write(model, folder: Path) -> None:
    """A distributed checkpoint of a model that one process holds, without the processes that Megatron's writer spawns."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from kvcat_nemo.conversion.dist_checkpoint import CheckpointWriter

    state = model.sharded_state_dict()
    apply_factories(state)
    writer = CheckpointWriter(folder, ("",))
    for entry in nested_values(state):
        if isinstance(entry, ShardedTensor):
            data = entry.data.detach().clone()[(None,) * entry.prepend_axis_num]
            writer.add_tensor(entry.key, data, entry.global_shape, entry.global_offset)
    writer.close()
