"""SmolLM2-135M: a real model that trains on a laptop's CPU. The quickstart's recipe."""

from __future__ import annotations

import nemo_run as run
from nemo.collections import llm
from nemo.collections.llm.recipes import llama32_1b

from kvcat_nemo.nemo.config import KVCatSmolLM2Config135M
from kvcat_nemo.recipes.base import as_kvcat


@run.cli.factory(target=llm.pretrain, name="kvcat_smollm2_135m")
def kvcat_smollm2_135m(
    base: str | None = None,
    paths: str | None = None,
    dir: str | None = None,
    name: str = "kvcat_smollm2_135m",
) -> run.Partial:
    """KV-CAT on SmolLM2-135M in one process: short windows and a short run; routers at layers 0, 7, 15, 22.

    The paper's routers start at keep probability 1 and have 40,000 steps to come down. A run of some tens of steps starts
    them at the threshold instead (`router_init_keep`), so that the masked pass masks from the first step.
    """
    recipe = as_kvcat(
        llama32_1b.pretrain_recipe(), KVCatSmolLM2Config135M, base=base, paths=paths, dir=dir, name=name
    )
    recipe.trainer.devices = 1
    recipe.trainer.num_nodes = 1
    recipe.trainer.strategy.context_parallel_size = 1
    recipe.trainer.max_steps = 40
    recipe.trainer.val_check_interval = 20
    recipe.trainer.limit_val_batches = 8
    recipe.model.config.kvcat.router_init_keep = 0.5
    recipe.data.seq_length = 512
    recipe.data.micro_batch_size = 1
    recipe.data.global_batch_size = 1
    recipe.data.num_workers = 0
    recipe.optim.lr_scheduler.warmup_steps = 4
    recipe.log.ckpt.every_n_train_steps = 40
    return recipe
