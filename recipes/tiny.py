"""A model of 0.2 M parameters on made-up windows: seconds per run, for tests and first looks."""

from __future__ import annotations

import nemo_run as run
from nemo.collections import llm

from kvcat_nemo.nemo.config import KVCatQwen2Config
from kvcat_nemo.nemo.data import SyntheticDataModule
from kvcat_nemo.recipes.smollm2 import kvcat_smollm2_135m


@run.cli.factory(target=llm.pretrain, name="kvcat_tiny")
def kvcat_tiny(dir: str | None = None, name: str = "kvcat_tiny") -> run.Partial:
    """KV-CAT on a 4-layer Qwen2-style model with two routers; needs no checkpoint and no data."""
    recipe = kvcat_smollm2_135m(dir=dir, name=name)
    kvcat = recipe.model.config.kvcat
    recipe.model.config = run.Config(
        KVCatQwen2Config,
        kvcat=kvcat,
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=176,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=128,
        seq_length=64,
        rotary_base=10000.0,
    )
    kvcat.num_groups = 2
    kvcat.router_dim = 16
    recipe.data = run.Config(SyntheticDataModule)
    recipe.optim.config.lr = 1e-3
    recipe.trainer.max_steps = 20
    recipe.trainer.val_check_interval = 10
    recipe.trainer.limit_val_batches = 2
    recipe.log.ckpt.every_n_train_steps = 10
    return recipe
