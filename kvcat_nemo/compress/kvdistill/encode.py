"""A context through the adapted model: scores, choice, and the chosen tokens' slots. Memory is that of one part at a time.

    scores    the first η layers of the plain model, then the scorer
    choice    the highest scores of the whole context, and what must stay
    slots     all layers with adapters: K and V of every token, Q and O of chosen ones; chosen slots stay in every layer and head

A context of more than `context_window` tokens is cut into parts of that size. Each part is read by itself, at its positions in
the text; the choice is made over all of them.

Shapes: T tokens, C of a part, G KV heads, S kept slots, D and E head dims, M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.hf_attention import causal, run
from kvcat_nemo.compress.kvdistill.adapter import Adapter
from kvcat_nemo.method.kvdistill import choose
from kvcat_nemo.method.kvdistill.selection import always_kept


class _Scored(Exception):  # noqa: N818 - no error: it ends a pass whose rest nobody needs
    pass


class _Causal:
    """Plain causal attention of a part's own tokens; `keep` is given each layer's keys and values."""

    def __init__(self, keep: Callable[[Tensor, Tensor], None] | None = None):
        self.keep = keep

    def attend(self, layer, q, k, v, scale):
        if self.keep is not None:
            self.keep(k, v)
        return causal(q, k, v, scale)


@torch.no_grad()
def encode(
    model: PreTrainedModel,
    ids_T: Tensor,
    slots: int,
    adapter: Adapter,
    *,
    whole_T: Tensor | None = None,
    on_part: Callable[[int, int], None] | None = None,
) -> KVCache:
    """The compressed cache of one context.

    Args:
        ids_T: its tokens; slots: how many of them stay, in every layer and head.
        whole_T: bool, tokens that must stay besides the first `always_keep`.
        on_part: called with (parts done, parts) after each part of either pass.

    Raises:
        ValueError: when fewer slots are asked for than must stay.
    """
    config, T = adapter.config, len(ids_T)
    parts = [slice(a, min(a + config.context_window, T)) for a in range(0, T, config.context_window)]
    total, done = 2 * len(parts), 0

    def tell():
        nonlocal done
        done += 1
        if on_part is not None:
            on_part(done, total)

    scores = []
    for part in parts:
        scores.append(token_scores(model, ids_T[part], part.start, adapter))
        tell()
    score_T = torch.cat(scores)
    everything = torch.ones_like(score_T, dtype=torch.bool)[None]
    must = always_kept(everything, config.always_keep)
    if whole_T is not None:
        must = must | whole_T[None]
    if slots < int(must.sum()):
        raise ValueError(
            f"kv-distill: {slots} slots, but {int(must.sum())} tokens must stay (the first {config.always_keep} and spans kept"
            " whole); give a larger budget"
        )
    kept = torch.tensor([slots], device=score_T.device)
    chosen_T = choose(score_T[None], everything, kept, must)[0]

    keys: list[list[Tensor]] = [[] for _ in model.model.layers]
    values: list[list[Tensor]] = [[] for _ in model.model.layers]
    for part in parts:
        for layer, (k, v) in enumerate(
            adapted_slots(model, ids_T[part], part.start, adapter, chosen_T[part])
        ):
            keys[layer].append(k)
            values[layer].append(v)
        tell()
    bias_S = torch.zeros(int(chosen_T.sum()), device=score_T.device)
    if config.keep_gate_at_inference:
        weight = torch.where(must[0], torch.zeros_like(score_T), F.logsigmoid(score_T))
        bias_S = weight[chosen_T].float()
    layers = []
    for k, v in zip(keys, values, strict=True):
        k_GSD, v_GSE = torch.cat(k, 1), torch.cat(v, 1)
        layers.append(LayerCache(k_GSD[None], v_GSE[None], bias_S.expand(1, k_GSD.shape[0], -1).contiguous()))
    return KVCache(layers, torch.tensor([T], device=ids_T.device))


def token_scores(model: PreTrainedModel, ids_C: Tensor, start: int, adapter: Adapter) -> Tensor:
    """The scorer's numbers of a part's tokens, [C] float32 (float64 of a float64 model)."""
    eta, read = adapter.config.scorer_layer, []
    layers = model.model.layers

    def stop(module, args, kwargs):
        read.append(args[0] if args else kwargs["hidden_states"])
        raise _Scored

    behind = layers[eta] if eta < len(layers) else model.model.norm
    hook = behind.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        _forward(model, ids_C, start, _Causal())
    except _Scored:
        pass
    finally:
        hook.remove()
    wide = torch.promote_types(torch.float32, read[0].dtype)
    h = read[0][0].to(wide)
    w = {name: x.to(h) for name, x in adapter.scorer.items()}
    hidden = F.gelu(F.linear(h, w["up.weight"], w["up.bias"]))
    return F.linear(hidden, w["down.weight"], w["down.bias"])[:, 0]


def adapted_slots(
    model: PreTrainedModel, ids_C: Tensor, start: int, adapter: Adapter, chosen_C: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Keys [G, S, D] and values [G, S, E] of a part's chosen tokens, of every layer, as the adapted model computes them."""
    kept: list[tuple[Tensor, Tensor]] = []
    handler = _Causal(lambda k, v: kept.append((k[0][:, chosen_C], v[0][:, chosen_C])))
    with _adapted(model, adapter, chosen_C):
        _forward(model, ids_C, start, handler)
    return kept


@contextmanager
def _adapted(model: PreTrainedModel, adapter: Adapter, chosen_C: Tensor):
    """Adapters on the attention's four projections for the passes inside; the model is left as it was."""
    rows = chosen_C if adapter.config.routing else torch.ones_like(chosen_C)
    rows_CI = rows[:, None]
    scale = adapter.config.lora_scale
    with ExitStack() as stack:
        for (layer, projection), (a, b) in adapter.lora.items():
            linear = getattr(model.model.layers[layer].self_attn, f"{projection}_proj")
            a, b = a.to(linear.weight.device), b.to(linear.weight.device)

            def add(module, args, output, a=a, b=b, routed=projection in "qo"):
                x = args[0]
                delta = scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
                return output + (torch.where(rows_CI, delta, 0.0) if routed else delta)

            stack.callback(linear.register_forward_hook(add).remove)
        yield


def _forward(model: PreTrainedModel, ids_C: Tensor, start: int, handler: _Causal) -> None:
    positions = torch.arange(start, start + len(ids_C), device=ids_C.device)
    run(model, ids_C[None], positions[None], handler, logits=0)
