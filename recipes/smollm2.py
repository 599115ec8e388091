"""SmolLM2-135M: a real model that trains on a laptop's CPU. The quickstart's recipe."""

from typing import Optional

import nemo_run as run
from nemo.collections.llm.recipes import llama32_1b

from kvcat_nemo.nemo.model_configs import KVCatSmolLM2Config135M
from kvcat_nemo.recipes.base import as_kvcat
from kvcat_nemo.recipes.overrides import recipe


@recipe("kvcat_smollm2_135m")
def kvcat_smollm2_135m(
    base: Optional[str] = None,
    paths: Optional[str] = None,
    dir: Optional[str] = None,
    name: str = "kvcat_smollm2_135m",
) -> run.Partial:
    """KV-CAT on SmolLM2-135M in one process: short windows and a short run; routers at layers 0, 7, 15, 22.

    The paper's routers start at keep probability 1 and have 40,000 steps to come down. A run of some tens of steps starts
    them at the threshold instead (`router_init_keep`), spread wide enough (`router_init_jitter`) that an update moves some
    tokens across it and not all, and holds them there by a heavier budget loss. docs/LOG.md has what was tried.
    """
    out = as_kvcat(
        llama32_1b.pretrain_recipe(), KVCatSmolLM2Config135M, base=base, paths=paths, dir=dir, name=name
    )
    out.trainer.devices = 1
    out.trainer.num_nodes = 1
    out.trainer.strategy.context_parallel_size = 1
    out.trainer.max_steps = 40
    out.trainer.val_check_interval = 20
    out.trainer.limit_val_batches = 8
    kvcat = out.model.config.kvcat
    kvcat.budget_weight = 10.0
    out.data.seq_length = 512
    out.data.micro_batch_size = 1
    out.data.global_batch_size = 1
    out.data.num_workers = 0
    out.optim.lr_scheduler.warmup_steps = 4
    out.log.ckpt.every_n_train_steps = 40
    return out
