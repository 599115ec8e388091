"""KV-Distill's trained parameters → an adapter folder for Hugging Face models (kvcat_nemo.compress.kvdistill.adapter).

Rows of Megatron's Q, K and V come head by head in the order of Hugging Face's, and both rotate halves: nothing is permuted.
"""

from __future__ import annotations

from kvcat_nemo.compress.kvdistill.adapter import SCORER, Adapter, adapted


def adapter_of(model, *, base_name: str = "", base_fingerprint: str | None = None) -> Adapter:
    """The adapter of a whole model (engine.kvdistill.model.KVDistillGPTModel) on one rank.

    Args:
        base_name, base_fingerprint: of the base's Hugging Face folder.

    Raises:
        ValueError: when this rank holds a part of the model alone.
    """
    config = model.config
    parts = {
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
    }
    for name, size in parts.items():
        if size != 1:
            raise ValueError(
                f"{name}={size}: load the checkpoint into one rank first, which then holds every adapter"
            )
    shape = {
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
    }
    lora = {}
    for layer, projection in adapted(config.num_layers):
        block = model.decoder.layers[layer]
        module = block.output_adapter if projection == "o" else block.qkv_adapter
        pair = (getattr(module, f"{projection}_{part}") for part in ("down", "up"))
        lora[layer, projection] = tuple(x.detach().cpu().clone() for x in pair)
    state = model.scorer.state_dict()
    scorer = {name: state[name].detach().cpu().clone() for name in SCORER}
    return Adapter(config.kvdistill, shape, lora, scorer, base_fingerprint, base_name)
