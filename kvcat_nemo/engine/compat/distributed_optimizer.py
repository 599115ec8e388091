"""Lets Megatron's distributed optimizer save and load the state of a paired model. Four faults of Megatron-core 0.15 and 0.16:

- *Parameters of two dtypes in one group.* Routers are float32 in a bf16 model. The optimizer puts a group's float32 parameters
  before its bf16 ones, but numbers them in the order of the gradient buffers: a checkpoint asks for one parameter's moments
  and gets another's. Where their sizes differ the save fails; where they are equal nothing is noticed.
- *Several buckets.* The form `fully_reshardable` joins the buckets' states without the padding between them, and cuts the
  parameters out of it by places that count the padding: what lies behind a bucket of an odd size is saved shifted, silently.
- *PyTorch's Adam*, which hosts without Transformer Engine and apex have. The form `fully_reshardable` is written, and then
  cannot be read: loading asks the checkpoint for the step counter, which is kept elsewhere.
- *The same:* loading gives all parameters one and the same step tensor, which Adam then counts up once for each of them; and
  an optimizer that has made no step yet does not know its step at all.
"""

from __future__ import annotations

import functools

import torch

from kvcat_nemo.engine.compat import MEGATRON
from kvcat_nemo.engine.compat.gradient_buffers import places_without_padding

_WHY = "save and load the optimizer's state"
REACHED = {
    "_build_optimizer_group_ranges": ("param_groups", "gbuf_ranges"),
    "_set_main_param_and_optimizer_states": ("model_param", "tensors"),
    "sharded_param_state_fully_reshardable": (),
    "load_state_dict": (),
    "state_dict": (),
}
"""Methods of Megatron's DistributedOptimizer that are wrapped, and parameters that the wrappers know."""


def patch_distributed_optimizer() -> None:
    """Patch the faults above, once per process; call it before an optimizer is built."""
    from megatron.core.optimizer import distrib_optimizer

    cls = distrib_optimizer.DistributedOptimizer
    if getattr(cls, "kvcat_patched", False):
        return
    for name, takes in REACHED.items():
        MEGATRON.reach(cls, name, _WHY, takes=takes)
    cls.kvcat_patched = True
    _number_parameters_as_they_are_kept(cls)
    _cut_parameters_without_padding(cls)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _keep_torch_adams_step(cls)


def _number_parameters_as_they_are_kept(cls: type) -> None:
    build = cls._build_optimizer_group_ranges.__func__

    @functools.wraps(build)
    def float32_first(klass, param_groups, gbuf_ranges):
        numbers, groups = build(klass, param_groups, gbuf_ranges)
        for index, group in enumerate(groups):
            group["params"] = sorted(group["params"], key=lambda p: p.dtype != torch.float32)  # stable
            numbers |= {parameter: (index, place) for place, parameter in enumerate(group["params"])}
        return numbers, groups

    cls._build_optimizer_group_ranges = classmethod(float32_first)


def _cut_parameters_without_padding(cls: type) -> None:
    form = cls.sharded_param_state_fully_reshardable

    @functools.wraps(form)
    def cut_without_padding(self, *args, **kwargs):
        places = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = places_without_padding(buffer)
            return form(self, *args, **kwargs)
        finally:
            for buffer, place in zip(self.buffers, places, strict=True):
                buffer.param_index_map = place

    cls.sharded_param_state_fully_reshardable = cut_without_padding


def _keep_torch_adams_step(cls: type) -> None:
    put, load, state_dict = cls._set_main_param_and_optimizer_states, cls.load_state_dict, cls.state_dict

    @functools.wraps(put)
    def put_all_but_the_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        return put(self, model_param, tensors | {"step": state["step"]} if "step" in state else tensors)

    @functools.wraps(load)
    def load_with_a_step_each(self, state):
        result = load(self, state)
        for held in self.optimizer.state.values():
            if isinstance(held.get("step"), torch.Tensor):
                held["step"] = held["step"].clone()
        return result

    @functools.wraps(state_dict)
    def state_dict_of_a_known_step(self):
        fresh = not self.optimizer.state
        if fresh:  # for the call alone: Megatron allocates moments where an optimizer has no state
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32)}
        try:
            return state_dict(self)
        finally:
            if fresh:
                self.optimizer.state.clear()

    cls._set_main_param_and_optimizer_states = put_all_but_the_step
    cls.load_state_dict = load_with_a_step_each
    cls.state_dict = state_dict_of_a_known_step
