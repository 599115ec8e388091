"""NeMo's Megatron strategy and precision, for either host; and the start from a base checkpoint."""

import contextlib
import copy
import os
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from nemo import lightning as nl
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.utils import logging

from kvcat_nemo.common.processes import children_die_with_us
from kvcat_nemo.engine import hardware
from kvcat_nemo.engine.compat.distributed_optimizer import patch_distributed_optimizer
from kvcat_nemo.nemo.base_model import check_base
from kvcat_nemo.nemo.checkpoint_check import first_whole, whole_base
from kvcat_nemo.nemo.checkpoint_io import make_checkpoint_io
from kvcat_nemo.nemo.compat import fit_strategy_to_cpu
from kvcat_nemo.nemo.old_names import moved_class
from kvcat_nemo.nemo.plan import check_trainer, checked_layout
from kvcat_nemo.nemo.rng_callback import load_random_state, random_state_entry
from kvcat_nemo.nemo.run_state import run_state
from kvcat_nemo.nemo.trainer import start_run
from kvcat_nemo.runs.pickles import check_common, check_index, plain_values_only

RNG_SEED = 1234  # NeMo's own default where it seeds the tracker


class KVCatStrategy(nl.MegatronStrategy):
    """MegatronStrategy that also runs on a CPU host, starts from base checkpoints, which hold no routers, and looks at
    a checkpoint's files before it loads them.
    """

    # No __init__ of its own: NeMo stores the arguments of this class by its signature.
    _candidates: tuple[Path, ...] = ()
    _verify_hashes = True
    _unverified = False
    _foreign = False
    _io = None

    def connect(self, model) -> None:
        patch_distributed_optimizer()
        if not hardware.is_cuda():
            self._fit_cpu(model)
        start_run(model.trainer)
        self._check(model)
        super().connect(model)

    def _check(self, model) -> None:
        """Refuse a run that does not fit, while nothing but this process has started."""
        trainer = model.trainer
        if trainer.datamodule is None:
            return
        check_trainer(trainer)
        world_size = trainer.num_devices * trainer.num_nodes
        if not self.ckpt_optim_fully_reshardable and model.optim.config.use_distributed_optimizer:
            from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

            if not HAVE_APEX_OR_TE:
                raise ValueError(
                    "trainer.strategy.ckpt_optim_fully_reshardable=False: without Transformer Engine and apex Adam is PyTorch's, and "
                    "the first save would fail; set it to True, or optim.config.use_distributed_optimizer=False"
                )
        checked_layout(
            copy.copy(model.config),
            self,
            trainer.datamodule,
            model.optim.config,
            world_size,
            trainer.precision_plugin,
            trainer.callbacks,
        )
        if hasattr(trainer.datamodule, "check_run"):
            trainer.datamodule.check_run(trainer, self._candidates)

    def _fit_cpu(self, model) -> None:
        # Here and not in the recipe: a recipe may be built on a login node and run on GPUs.
        fit_strategy_to_cpu(self, hardware.process_group_backend())
        # Forked writers work here too, but training has no idle core for them: for tests alone.
        self.async_save = self.async_save and os.environ.get("KVCAT_ASYNC_SAVE_ON_CPU") == "1"
        self.parallel_load = False
        self.pipeline_dtype = torch.float32
        self.ddp_config.overlap_grad_reduce = self.ddp_config.overlap_param_gather = False
        self.ddp_config.average_in_collective = False  # gloo sums, and knows no average
        # Every rank holds the whole state: nobody trains large models here. A test may ask for the form that GPU hosts save.
        if os.environ.get("KVCAT_DISTRIBUTED_OPTIMIZER_ON_CPU") != "1":
            self.ddp_config.use_distributed_optimizer = model.optim.config.use_distributed_optimizer = False

    @property
    def checkpoint_io(self):
        if not self._io:
            self._io = make_checkpoint_io(
                save_ckpt_format=self.save_ckpt_format,
                async_save=self.async_save,
                torch_dist_multiproc=self.torch_dist_multiproc,
                assume_constant_structure=self.assume_constant_structure,
                parallel_save=self.parallel_save,
                parallel_save_within_dp=self.parallel_save_within_dp,
                parallel_load=self.parallel_load,
                load_directly_on_device=self.load_directly_on_device,
            )
        return self._io

    @checkpoint_io.setter
    def checkpoint_io(self, io) -> None:
        self._io = io

    def resume_from(
        self, candidates: list[Path], *, verify_hashes: bool, unverified: bool = False, foreign: bool = False
    ) -> None:
        """Checkpoints to resume from, the first choice first (KVCatResume); foreign: they are not this run's own."""
        self._foreign = foreign
        self._candidates, self._verify_hashes = tuple(candidates), verify_hashes
        self._unverified = unverified

    def save_checkpoint(self, checkpoint, filepath, storage_options=None) -> None:
        """As NeMo's, with every rank's random state."""
        if "optimizer_states" in checkpoint:  # not when the weights alone are saved
            checkpoint |= random_state_entry(run_state(self.trainer))
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path, selective_restore: bool = False):
        """As NeMo's, from the newest of the candidates whose files are what their manifest says.

        Raises:
            ValueError: when there is none; names every damaged file.
        """
        if not selective_restore and self._candidates:
            checkpoint_path = first_whole(
                self._candidates, hashes=self._verify_hashes, unverified=self._unverified
            )
        weights = ckpt_to_weights_subdir(Path(checkpoint_path), is_saving=False)
        check_index(weights)
        check_common(weights)
        # A run's own checkpoints hold what NeMo and Megatron pickled; a checkpoint from elsewhere may hold anything.
        with plain_values_only() if self._foreign else contextlib.nullcontext():
            loaded = super().load_checkpoint(weights, selective_restore)
        if not selective_restore:
            load_random_state(run_state(self.trainer), weights)
        return loaded

    def setup_distributed(self) -> None:
        children_die_with_us()
        super().setup_distributed()
        if not hardware.is_cuda():  # NeMo seeds Megatron's tracker only where it counts GPUs
            state = torch.get_rng_state()
            tensor_parallel.model_parallel_cuda_manual_seed(
                RNG_SEED + 100 * parallel_state.get_pipeline_model_parallel_rank()
            )
            torch.set_rng_state(state)

    def selective_restore(self) -> None:
        """Load the weights of `restore_config.path`: a converted base model, or a training checkpoint.

        Raises:
            ValueError: when the checkpoint's files are not what its manifest says, when it is of another architecture, or lacks a
                parameter other than a router's.
        """
        if not self.restore_config:
            return
        if self.restore_config.load_optim_state:
            raise ValueError(
                "resume.restore_config.load_optim_state=True: a base model has no optimizer state; set it to False"
            )
        path = Path(self.restore_config.path)
        check_base(path, self.lightning_module.config)
        whole_base(path, hashes=self._verify_hashes, unverified=self._unverified)
        weights = ckpt_to_weights_subdir(path, is_saving=False)
        check_index(weights)
        check_common(weights)
        stored = set(dist_checkpointing.load_tensors_metadata(str(weights)))
        wanted = self.megatron_parallel.sharded_state_dict(metadata={})
        has_routers = any(".router." in key for key in stored)
        missing: list[str] = []

        def fit(entry):
            if not isinstance(entry, ShardedBase):
                return entry
            if entry.key not in stored:
                entry.key = entry.key.removeprefix("module.")  # NeMo's keys carry its wrapper's name
            if entry.key in stored:
                return entry
            if ".router." in entry.key and not has_routers:
                return LocalNonpersistentObject(entry.data)  # as initialised
            if entry.key.endswith("_extra_state"):
                return LocalNonpersistentObject(None)
            missing.append(entry.key)
            return entry

        dict_list_map_inplace(fit, wanted)
        if missing:
            raise ValueError(
                f"{path} does not hold {len(missing)} of the model's parameters, such as {missing[0]}: it is not a checkpoint of this "
                "model (for routers: kvcat.num_groups and kvcat.router_dim must be those of the run that saved it)"
            )
        with plain_values_only():
            loaded = dist_checkpointing.load(wanted, str(weights))
        self.load_model_state_dict({"state_dict": loaded}, strict=True)
        routers = "routers and all" if has_routers else "routers start anew"
        logging.info(f"Started from the weights of {path} ({routers})")
        self.barrier("kvcat.base_loaded")


class KVCatPrecision(nl.MegatronMixedPrecision):
    """bf16 (or what is asked for) on CUDA, float32 on a CPU host."""

    def __init__(
        self,
        precision: str = "bf16-mixed",
        params_dtype: torch.dtype | None = None,
        pipeline_dtype: torch.dtype | None = None,
        autocast_enabled: bool = False,
        grad_reduce_in_fp32: bool = True,
        **others,
    ):
        """Args: others: as NeMo's; nemo.trainer_settings says which are refused, and why."""
        if not hardware.is_cuda():
            precision, params_dtype, pipeline_dtype = "32", torch.float32, torch.float32
        super().__init__(
            precision=precision,
            params_dtype=params_dtype,
            pipeline_dtype=pipeline_dtype,
            autocast_enabled=autocast_enabled,
            grad_reduce_in_fp32=grad_reduce_in_fp32,
            **others,
        )


def __getattr__(name: str):
    return moved_class(__name__, name)
