"""Llama 3.1."""

from __future__ import annotations

import nemo_run as run
from nemo.collections import llm
from nemo.collections.llm.recipes import llama31_8b

from kvcat_nemo.nemo.config import KVCatLlama31Config8B
from kvcat_nemo.recipes.base import as_kvcat


@run.cli.factory(target=llm.pretrain, name="kvcat_llama31_8b")
def kvcat_llama31_8b(
    base: str | None = None, paths: str | None = None, dir: str | None = None, name: str = "kvcat_llama31_8b"
) -> run.Partial:
    """KV-CAT on Llama-3.1-8B: the paper's schedule, tensor-parallel 4 with sequence parallelism; routers at 0, 8, 16, 24."""
    recipe = as_kvcat(
        llama31_8b.pretrain_recipe(), KVCatLlama31Config8B, base=base, paths=paths, dir=dir, name=name
    )
    recipe.trainer.strategy.tensor_model_parallel_size = 4
    recipe.trainer.strategy.sequence_parallel = True
    recipe.trainer.strategy.context_parallel_size = 1
    recipe.data.micro_batch_size = 2
    return recipe
