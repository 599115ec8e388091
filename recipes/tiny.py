"""A model of 0.2 M parameters on made-up windows: seconds per run, for tests and first looks."""

from typing import Optional

import nemo_run as run

from kvcat_nemo.nemo.data_module import SyntheticDataModule
from kvcat_nemo.nemo.model_configs import KVCatQwen2Config
from kvcat_nemo.recipes.overrides import recipe
from kvcat_nemo.recipes.smollm2 import kvcat_smollm2_135m


@recipe("kvcat_tiny")
def kvcat_tiny(dir: Optional[str] = None, name: str = "kvcat_tiny") -> run.Partial:
    """KV-CAT on a 4-layer Qwen2-style model with two routers; needs no checkpoint and no data."""
    out = kvcat_smollm2_135m(dir=dir, name=name)
    kvcat = out.model.config.kvcat
    out.model.config = run.Config(
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
    out.data = run.Config(SyntheticDataModule)
    out.optim.config.lr = out.optim.lr_scheduler.min_lr = 2e-3
    out.trainer.max_steps = 20
    out.trainer.val_check_interval = 10
    out.trainer.limit_val_batches = 2
    out.log.ckpt.every_n_train_steps = 10
    return out


@recipe("kvcat_tiny_prefix")
def kvcat_tiny_prefix(dir: Optional[str] = None, name: str = "kvcat_tiny_prefix") -> run.Partial:
    """kvcat_tiny with random masks for rows behind a cut alone, as a compressor meets a prefix; no routers."""
    out = kvcat_tiny(dir=dir, name=name)
    kvcat = out.model.config.kvcat
    kvcat.policy, kvcat.mask_span = "random", "prefix"
    return out
