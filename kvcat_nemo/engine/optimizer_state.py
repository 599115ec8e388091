"""Lets a distributed optimizer that holds PyTorch's Adam resume: hosts without Transformer Engine and apex have no other.

Megatron-core (0.15 and 0.16) writes such a state in the form `fully_reshardable`, and then cannot read it, twice over:
- `_set_main_param_and_optimizer_states` asks the checkpoint for the step counter, which it keeps elsewhere;
- `load_state_dict` gives all parameters one and the same step tensor, which Adam then counts up once for each of them.
"""

from __future__ import annotations

import functools

import torch


def torch_adam_resumes() -> bool:
    """Mend both; nothing is changed where Megatron has a fused Adam.

    Returns:
        whether Megatron's Adam is PyTorch's.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    cls = distrib_optimizer.DistributedOptimizer
    if getattr(cls, "_kvcat_torch_adam", False):
        return True
    cls._kvcat_torch_adam = True
    put, load = cls._set_main_param_and_optimizer_states, cls.load_state_dict

    @functools.wraps(put)
    def put_all_but_the_step(self, model_param, tensors):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        return put(self, model_param, tensors | {"step": state["step"]} if "step" in state else tensors)

    @functools.wraps(load)
    def load_with_a_step_each(self, state_dict):
        result = load(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()
        return result

    cls._set_main_param_and_optimizer_states = put_all_but_the_step
    cls.load_state_dict = load_with_a_step_each
    return True
