"""Llama 3.1."""

from typing import Optional

import nemo_run as run
from nemo.collections.llm.recipes import llama31_8b

from kvcat_nemo.nemo.model_configs import KVCatLlama31Config8B
from kvcat_nemo.recipes.base import as_kvcat
from kvcat_nemo.recipes.overrides import recipe


@recipe("kvcat_llama31_8b")
def kvcat_llama31_8b(
    base: Optional[str] = None,
    paths: Optional[str] = None,
    dir: Optional[str] = None,
    name: str = "kvcat_llama31_8b",
) -> run.Partial:
    """KV-CAT on Llama-3.1-8B: the paper's schedule, tensor-parallel 4 with sequence parallelism; routers at 0, 8, 16, 24."""
    out = as_kvcat(
        llama31_8b.pretrain_recipe(), KVCatLlama31Config8B, base=base, paths=paths, dir=dir, name=name
    )
    out.trainer.strategy.tensor_model_parallel_size = 4
    out.trainer.strategy.sequence_parallel = True
    out.trainer.strategy.context_parallel_size = 1
    out.data.micro_batch_size = 2
    return out
