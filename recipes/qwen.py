"""Qwen2.5 and Qwen3 (dense). The 0.5B and 1.5B are the paper's models, with its settings."""

from typing import Optional

import nemo_run as run
from nemo.collections.llm.recipes import qwen3_1p7b, qwen25_1p5b, qwen25_7b, qwen25_500m

from kvcat_nemo.nemo.model_configs import (
    KVCatQwen3Config1P7B,
    KVCatQwen25Config1P5B,
    KVCatQwen25Config7B,
    KVCatQwen25Config500M,
)
from kvcat_nemo.recipes.base import as_kvcat
from kvcat_nemo.recipes.overrides import recipe


@recipe("kvcat_qwen25_0p5b")
def kvcat_qwen25_0p5b(
    base: Optional[str] = None,
    paths: Optional[str] = None,
    dir: Optional[str] = None,
    name: str = "kvcat_qwen25_0p5b",
) -> run.Partial:
    """KV-CAT on Qwen2.5-0.5B: the paper's settings on one node of eight GPUs; routers at layers 0, 6, 12, 18."""
    out = qwen25_500m.pretrain_recipe()
    return as_kvcat(out, KVCatQwen25Config500M, base=base, paths=paths, dir=dir, name=name)


@recipe("kvcat_qwen25_1p5b")
def kvcat_qwen25_1p5b(
    base: Optional[str] = None,
    paths: Optional[str] = None,
    dir: Optional[str] = None,
    name: str = "kvcat_qwen25_1p5b",
) -> run.Partial:
    """KV-CAT on Qwen2.5-1.5B: the paper's settings on one node of eight GPUs; routers at layers 0, 7, 14, 21."""
    out = qwen25_1p5b.pretrain_recipe(tensor_parallelism=1)
    return as_kvcat(out, KVCatQwen25Config1P5B, base=base, paths=paths, dir=dir, name=name)


@recipe("kvcat_qwen25_7b")
def kvcat_qwen25_7b(
    base: Optional[str] = None,
    paths: Optional[str] = None,
    dir: Optional[str] = None,
    name: str = "kvcat_qwen25_7b",
) -> run.Partial:
    """KV-CAT on Qwen2.5-7B: the paper's schedule, tensor-parallel 4 with sequence parallelism."""
    out = qwen25_7b.pretrain_recipe(tensor_parallelism=4, sequence_parallelism=True)
    out = as_kvcat(out, KVCatQwen25Config7B, base=base, paths=paths, dir=dir, name=name)
    out.data.micro_batch_size = 2
    return out


@recipe("kvcat_qwen3_1p7b")
def kvcat_qwen3_1p7b(
    base: Optional[str] = None,
    paths: Optional[str] = None,
    dir: Optional[str] = None,
    name: str = "kvcat_qwen3_1p7b",
) -> run.Partial:
    """KV-CAT on Qwen3-1.7B: the paper's schedule on one node of eight GPUs; routers at layers 0, 7, 14, 21."""
    out = qwen3_1p7b.pretrain_recipe(tensor_parallelism=1)
    return as_kvcat(out, KVCatQwen3Config1P7B, base=base, paths=paths, dir=dir, name=name)
