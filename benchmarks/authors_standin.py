"""Stands in for the authors' repository in attention_matching_authors.py --smoke: their names, a compactor that keeps everything.

A cache that is kept whole scores as the dense model does, so that the script's windows, positions and figures are checked.
"""

from __future__ import annotations

import sys
import types

METHOD, QUERIES = "keep-all", "repeat"


def install() -> None:
    """Put the modules that the script imports into sys.modules."""
    import torch
    from transformers import LlamaForCausalLM
    from transformers.cache_utils import DynamicCache

    class QueryGenerator:
        def generate_queries(self, *, tokenizer, formatted_context, return_sequences=False):
            ids = tokenizer(formatted_context + "\n" + formatted_context).input_ids
            return ids, {"final_n_queries_per_kv_head": ids.shape[1]}, [{"suffix_token_ids": ids}]

    class KeepAll:
        def compact_kv_cache(
            self, *, past_key_values, target_size, indices, query_config, model, tokenizer, formatted_context
        ):
            _, facts, _ = QueryGenerator().generate_queries(
                tokenizer=tokenizer, formatted_context=formatted_context
            )
            layers = [
                (
                    layer.keys[:, :, list(indices)],
                    torch.zeros(layer.keys.shape[:3]),
                    layer.values[:, :, list(indices)],
                )
                for layer in past_key_values.layers
            ]
            return layers, {"query_generation": facts}

    class CompactedPrefixCache(DynamicCache):
        def __init__(self, layers, original_seq_len, clone=False):
            super().__init__()
            for number, (keys, _, values) in enumerate(layers):
                self.update(keys, values, number)
            assert self.get_seq_length() == original_seq_len

    contents = {
        "evaluation": {},
        "evaluation.configs": {},
        "evaluation.configs.algorithms": {},
        "evaluation.configs.algorithms.default": {"config": {METHOD: {}}},
        "evaluation.configs.utils": {"load_query_config": lambda name: name},
        "compaction": {},
        "compaction.query_generation": {"QueryGenerator": QueryGenerator},
        "compaction.compaction_methods": {},
        "compaction.compaction_methods.registry": {
            "get_compaction_method": lambda name, method_kwargs: KeepAll()
        },
        "models": {},
        "models.cache": {"CompactedPrefixCache": CompactedPrefixCache},
        "models.llama": {"LlamaForCausalLM": LlamaForCausalLM},
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        sys.modules[name] = module
