"""Derives a KV-CAT recipe from one of NeMo's: replaces the parts that know the method and keeps the rest."""

from __future__ import annotations

import fiddle as fdl
import nemo_run as run
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_mixed

from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.nemo.checkpoint import KVCatCheckpoint
from kvcat_nemo.nemo.data_module import KVCatDataModule
from kvcat_nemo.nemo.lightning_module import KVCatModel
from kvcat_nemo.nemo.mlflow_logger import MLflowTracker
from kvcat_nemo.nemo.optimizer import KVCatOptimizerModule
from kvcat_nemo.nemo.resume import KVCatResume
from kvcat_nemo.nemo.strategy import KVCatPrecision, KVCatStrategy
from kvcat_nemo.nemo.trainer import CALLBACKS, KVCatTrainer

# The routers' settings that the study stands on (docs/evidence.md; 4 and 135 M parameters, runs of up to 250 steps). With the
# paper's start nothing was hidden after 24 steps, with a capped gate gradient or its budget weight the target was missed.
STUDIED = {
    "router_init_keep": 0.51,
    "router_init_jitter": 1.0,
    "budget_weight": 3.0,
    "gate_gradient_cap": 0.0,
    "router_detach_input": True,  # or that budget loss would train the backbone too
}

DDP = {
    "check_for_nan_in_grad": False,  # it ends one rank alone; the guard looks on behalf of all
    "grad_reduce_in_fp32": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "average_in_collective": True,  # NCCL divides while it sums; a CPU host, whose gloo cannot, divides first
}
"""Data parallelism as NeMo's recipes have it, for those that leave it to the defaults."""


def as_kvcat(
    recipe: run.Partial, config: type, *, base: str | None, paths: str | None, dir: str | None, name: str
) -> run.Partial:
    """A NeMo pretraining recipe with the paired model, its data, its start and its records.

    The paper's training set-up is filled in (arXiv 2605.05971): sequence 1,024, 131 k tokens a step, 40 k steps, AdamW
    1e-4 → 5e-6 with 600 steps of warm-up, weight decay 0.01, betas (0.9, 0.95), clip 1.0. The routers' settings are the
    study's (STUDIED), not the paper's.

    Args:
        recipe: any of NeMo's `pretrain_recipe()`s; changed in place and returned.
        config: the model configuration, one of kvcat_nemo.nemo.model_configs.
        base: converted base model, for its weights and its tokenizer; paths: the data (kvcat_nemo.nemo.data_module).
        dir, name: the run's folder is dir/name.
    """
    recipe.model = run.Config(KVCatModel, config=run.Config(config, kvcat=run.Config(KVCatConfig, **STUDIED)))
    trainer = recipe.trainer = run.Config(KVCatTrainer, **_arguments(recipe.trainer))
    trainer.accelerator = "auto"  # CUDA where it is, the CPU elsewhere: the recipe is the same
    trainer.strategy = run.Config(KVCatStrategy, **_arguments(trainer.strategy))
    # NeMo's own where the recipe has some (a few have none), but for what is said here.
    trainer.strategy.ddp = run.Config(
        DistributedDataParallelConfig,
        **(DDP | _ddp_arguments(trainer.strategy) | {"check_for_nan_in_grad": False}),
    )
    # Checkpoints of this form load in any layout; NeMo's default form loads at other data-parallel sizes alone.
    trainer.strategy.ckpt_optim_fully_reshardable = True
    trainer.plugins = run.Config(KVCatPrecision, **_arguments(trainer.plugins or bf16_mixed()))
    trainer.logger = False  # the loggers are the log's
    trainer.strategy.ckpt_async_save = True  # on CUDA; a CPU host saves at once
    trainer.callbacks = [run.Config(callback) for callback in CALLBACKS]
    trainer.max_steps = 40_000
    trainer.val_check_interval = 1_000
    trainer.limit_val_batches = 8
    trainer.limit_test_batches = 0
    trainer.num_sanity_val_steps = 0
    trainer.log_every_n_steps = 1
    trainer.accumulate_grad_batches = 1  # Megatron accumulates micro-batches itself
    recipe.data = run.Config(
        KVCatDataModule, paths=paths, base=base, seq_length=1024, micro_batch_size=4, global_batch_size=128
    )
    optim = recipe.optim
    recipe.optim = run.Config(KVCatOptimizerModule, config=optim.config, lr_scheduler=optim.lr_scheduler)
    recipe.optim.config.lr = 1e-4
    recipe.optim.config.weight_decay = 0.01
    recipe.optim.config.adam_beta1, recipe.optim.config.adam_beta2 = 0.9, 0.95
    recipe.optim.config.clip_grad = 1.0
    recipe.optim.lr_scheduler.warmup_steps = 600
    recipe.optim.lr_scheduler.constant_steps = 0
    recipe.optim.lr_scheduler.min_lr = 5e-6
    recipe.log = run.Config(
        nl.NeMoLogger,
        name=name,
        log_dir=dir or "runs",
        ckpt=run.Config(
            KVCatCheckpoint, every_n_train_steps=1_000, keep_last=2, keep_best=1, best_metric="masked_ppl"
        ),
        tensorboard=None,
        extra_loggers=[run.Config(MLflowTracker, experiment="kvcat")],
    )
    recipe.resume = run.Config(KVCatResume, base=base)
    return recipe


def _ddp_arguments(strategy: run.Config) -> dict:
    ddp = _arguments(strategy).get("ddp")
    return _arguments(ddp) if isinstance(ddp, run.Config) else {}


def _arguments(config: run.Config) -> dict:
    """The arguments that were set on a fiddle configuration."""
    return fdl.ordered_arguments(config)
