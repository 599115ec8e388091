"""A transformer layer with KV-Distill's adapters. Shapes: as in engine.kvdistill.adapters."""

from __future__ import annotations

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from kvcat_nemo.engine.compat.gates import Gate
from kvcat_nemo.engine.group_stats import fixed_stats
from kvcat_nemo.engine.kvdistill.adapters import OutputAdapter, QKVAdapter, StudentRows
from kvcat_nemo.engine.layer import KVCatTransformerLayer
from kvcat_nemo.method.spans import Spans

ADAPTERS = {"qkv_adapter": {"q_up": 0, "k_up": 0, "v_up": 0}, "output_adapter": {"o_down": 1}}
"""Adapter modules of a layer → dimensions of their parameters that tensor-parallel ranks share; others are whole on each."""


class KVDistillTransformerLayer(KVCatTransformerLayer):
    """The paired pass' layer: adapters act on the student's context rows, gates on its answer rows.

    Adapters hang on the projections' outputs as hooks, so the base's parameters keep their names and their checkpoints.
    """

    def __init__(self, config, submodules, layer_number: int = 1, **kwargs):
        super().__init__(config, submodules, layer_number=layer_number, **kwargs)
        layer, last = self.layer_number - 1, self.layer_number == config.num_layers
        distill = config.kvdistill
        if getattr(self.self_attention.linear_qkv, "layer_norm_weight", None) is not None:
            raise ValueError(
                "transformer_impl: Transformer Engine's fused norm and QKV projection hide what adapters read; KV-Distill needs "
                "Megatron's own layers so far: train on a host without Transformer Engine"
            )
        self.qkv_adapter = QKVAdapter(config, distill, layer, self.tp_group, with_q=not last)
        self.output_adapter = None if last else OutputAdapter(config, distill, layer, self.tp_group)
        self.routing = distill.routing
        self._rows: StudentRows | None = None
        self.self_attention.linear_qkv.register_forward_hook(self._adapt(self.qkv_adapter))
        if self.output_adapter is not None:
            self.self_attention.linear_proj.register_forward_hook(self._adapt(self.output_adapter))

    def gated_forward(self, hidden_states: Tensor, *, gates, spans, documents, **kwargs):
        """One layer.

        Args:
            hidden_states: [P, 2B, M]; gates: of the context's slots, [1, B, T], 0 where a token was not chosen; None: a plain pass
                of the base alone.
            spans: method.spans' table: rows of each window's first span are its context.
            documents: None; a window is one example.
        """
        self._rows = None
        if gates is None:
            return self.plain_forward(hidden_states, gate=None, documents=documents, **kwargs), None
        gate, held = gates[0], Spans.from_table(spans, *gates.shape[1:])
        if self.layer_number == 1 and not self.is_recomputation:
            open_slots = (gate.detach() > 0).float()
            self.stats.append(fixed_stats(0, self.config.kvcat, open_slots, None, held, None))
        self._rows = student_rows(gate, held, self.routing)
        given = Gate(gate, held, shared_rows=False)
        try:
            hidden_states = self.plain_forward(hidden_states, gate=given, documents=None, **kwargs)
        finally:
            self._rows = None
        return hidden_states, gates

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Megatron's, with adapters under keys of their own, `…layers.kvdistill.{layer}.…`.

        Megatron stacks the layers of a model into one tensor per parameter; the last layer has fewer adapters than the others.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for part, axes in ADAPTERS.items():
            module = getattr(self, part)
            for name in [name for name in state if name.startswith(f"{prefix}{part}.")]:
                del state[name]
            if module is None:
                continue
            own = make_sharded_tensors_for_checkpoint(
                module.state_dict(keep_vars=True), f"{prefix}{part}.", axes
            )
            for tensor in own.values():
                name = tensor.key.removeprefix(f"{prefix}{part}.")
                tensor.key = f"{prefix}kvdistill.{self.layer_number - 1}.{name}"
            state.update(own)
        return state

    def _adapt(self, adapter):
        def hook(module, args, output):
            if self._rows is None:
                return None
            out, bias = output
            B = out.shape[1] // 2
            delta = adapter(args[0][:, B:], self._rows)
            return torch.cat([out[:, :B], out[:, B:] + delta], 1), bias

        return hook


def student_rows(gate_BT: Tensor, spans: Spans, routing: bool) -> StudentRows:
    """Rows of contexts, which are the slots that some row sees through its gate, and the chosen ones among them."""
    context = spans.gated_BT(gate_BT.device)
    chosen = context & (gate_BT.detach() > 0) if routing else context
    return StudentRows(*(x.T[..., None] for x in (context, chosen)))
