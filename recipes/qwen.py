"""Qwen2.5 and Qwen3 (dense). The 0.5B and 1.5B are the paper's models, with its settings."""

from __future__ import annotations

import nemo_run as run
from nemo.collections import llm
from nemo.collections.llm.recipes import qwen3_1p7b, qwen25_1p5b, qwen25_7b, qwen25_500m

from kvcat_nemo.nemo.config import (
    KVCatQwen3Config1P7B,
    KVCatQwen25Config1P5B,
    KVCatQwen25Config7B,
    KVCatQwen25Config500M,
)
from kvcat_nemo.recipes.base import as_kvcat


@run.cli.factory(target=llm.pretrain, name="kvcat_qwen25_0p5b")
def kvcat_qwen25_0p5b(
    base: str | None = None, paths: str | None = None, dir: str | None = None, name: str = "kvcat_qwen25_0p5b"
) -> run.Partial:
    """KV-CAT on Qwen2.5-0.5B: the paper's settings on one node of eight GPUs; routers at layers 0, 6, 12, 18."""
    recipe = qwen25_500m.pretrain_recipe()
    return as_kvcat(recipe, KVCatQwen25Config500M, base=base, paths=paths, dir=dir, name=name)


@run.cli.factory(target=llm.pretrain, name="kvcat_qwen25_1p5b")
def kvcat_qwen25_1p5b(
    base: str | None = None, paths: str | None = None, dir: str | None = None, name: str = "kvcat_qwen25_1p5b"
) -> run.Partial:
    """KV-CAT on Qwen2.5-1.5B: the paper's settings on one node of eight GPUs; routers at layers 0, 7, 14, 21."""
    recipe = qwen25_1p5b.pretrain_recipe(tensor_parallelism=1)
    return as_kvcat(recipe, KVCatQwen25Config1P5B, base=base, paths=paths, dir=dir, name=name)


@run.cli.factory(target=llm.pretrain, name="kvcat_qwen25_7b")
def kvcat_qwen25_7b(
    base: str | None = None, paths: str | None = None, dir: str | None = None, name: str = "kvcat_qwen25_7b"
) -> run.Partial:
    """KV-CAT on Qwen2.5-7B: the paper's schedule, tensor-parallel 4 with sequence parallelism."""
    recipe = qwen25_7b.pretrain_recipe(tensor_parallelism=4, sequence_parallelism=True)
    recipe = as_kvcat(recipe, KVCatQwen25Config7B, base=base, paths=paths, dir=dir, name=name)
    recipe.data.micro_batch_size = 2
    return recipe


@run.cli.factory(target=llm.pretrain, name="kvcat_qwen3_1p7b")
def kvcat_qwen3_1p7b(
    base: str | None = None, paths: str | None = None, dir: str | None = None, name: str = "kvcat_qwen3_1p7b"
) -> run.Partial:
    """KV-CAT on Qwen3-1.7B: the paper's schedule on one node of eight GPUs; routers at layers 0, 7, 14, 21."""
    recipe = qwen3_1p7b.pretrain_recipe(tensor_parallelism=1)
    return as_kvcat(recipe, KVCatQwen3Config1P7B, base=base, paths=paths, dir=dir, name=name)
