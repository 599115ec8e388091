"""KV-Distill's three streams written out on a small decoder: the oracle of the engine's single student stream.

    teacher    frozen weights, all tokens, plain causal attention
    context    adapted weights: K and V of every context token, Q and O of chosen ones; causal attention among themselves
    answer     frozen weights; sees the context's slots, as the adapted pass left them, through their gates, and itself plainly

A run of the first η layers of the frozen model on the context comes first: the scorer reads what leaves them. The loops and
matrices are plain; memory is O(T²). One window at a time.

Shapes: T tokens, C of them context, H query heads, G KV heads, D head dim, M width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvcat_nemo.method.kvdistill.config import KVDistillConfig
from kvcat_nemo.method.kvdistill.lora import RoutedLoRA
from kvcat_nemo.method.kvdistill.scorer import Scorer
from kvcat_nemo.method.kvdistill.selection import always_kept, choose, slot_gates
from kvcat_nemo.method.losses import distillation


@dataclass
class Layer:
    """Weights of a decoder layer, [out, in]: RMS norms, attention, SwiGLU."""

    norm_M: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    mlp_norm_M: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


@dataclass
class Decoder:
    """A decoder's weights."""

    embedding_VM: Tensor
    layers: list[Layer]
    norm_M: Tensor
    head_dim: int
    output_VM: Tensor | None = None
    """None: the embedding."""
    eps: float = 1e-6
    """Of the norms."""

    def logits(self, h_RM: Tensor) -> Tensor:
        weight = self.embedding_VM if self.output_VM is None else self.output_VM
        return rms_norm(h_RM, self.norm_M, self.eps) @ weight.T

    def rotated(self, x_THD: Tensor, place_T: Tensor) -> Tensor:
        """Rotary positions, base 10,000, halves rotated as in Llama."""
        half = self.head_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, dtype=x_THD.dtype) / half)
        angle = place_T[:, None, None].to(x_THD.dtype) * frequency
        first, second = x_THD[..., :half], x_THD[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
        )


@dataclass
class Adapters:
    """The four adapters of one layer."""

    q: RoutedLoRA
    k: RoutedLoRA
    v: RoutedLoRA
    o: RoutedLoRA


@dataclass
class Streams:
    """What the three streams of a window give."""

    teacher_TV: Tensor
    """Logits of every row."""
    student_TV: Tensor
    """Logits of the answer's rows, C … T − 1, [T − C, V]."""
    score_C: Tensor
    chosen_C: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def attend(q_RHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, weight_RS: Tensor) -> Tensor:
    """Attention in which row r sees slot s with weight w_rs: w_rs·e^{s_rs} / Σ w_rs·e^{s_rs}, [R, H, D]."""
    H, G = q_RHD.shape[1], k_SGD.shape[1]
    k, v = (x.repeat_interleave(H // G, 1) for x in (k_SGD, v_SGD))
    logits = torch.einsum("rhd,shd->hrs", q_RHD, k) * q_RHD.shape[-1] ** -0.5
    level = logits.masked_fill(weight_RS == 0, float("-inf")).amax(-1, keepdim=True).detach()
    e = weight_RS * (logits - level).clamp(max=80.0).exp()
    return torch.einsum("hrs,shd->rhd", e / e.sum(-1, keepdim=True), v)


def layer_rows(
    model: Decoder,
    layer: Layer,
    h_RM: Tensor,
    place_R: Tensor,
    before: tuple[Tensor, Tensor] | None,
    weight_RS: Tensor,
    adapters: Adapters | None = None,
    chosen_R: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer on some rows: (their hidden states, their rotated keys and values).

    Args:
        before: keys and values of earlier slots, [S − R, G, D]; None: none.
        weight_RS: what each row sees of the earlier slots and of these rows' own.
        adapters, chosen_R: of a context's rows; None: the frozen weights.
    """
    D = model.head_dim
    x = rms_norm(h_RM, layer.norm_M, model.eps)
    q, k, v = (x @ w.T for w in (layer.q, layer.k, layer.v))
    if adapters is not None:
        every = torch.ones_like(chosen_R)
        q = q + adapters.q(x, chosen_R)
        k, v = k + adapters.k(x, every), v + adapters.v(x, every)
    q, k, v = (y.unflatten(-1, (-1, D)) for y in (q, k, v))
    q, k = model.rotated(q, place_R), model.rotated(k, place_R)
    slots = (k, v) if before is None else tuple(torch.cat(pair) for pair in zip(before, (k, v), strict=True))
    a = attend(q, *slots, weight_RS).flatten(1)
    o = a @ layer.o.T
    if adapters is not None:
        o = o + adapters.o(a, chosen_R)
    h = h_RM + o
    x = rms_norm(h, layer.mlp_norm_M, model.eps)
    return h + (F.silu(x @ layer.gate.T) * (x @ layer.up.T)) @ layer.down.T, (k, v)


def three_streams(
    model: Decoder,
    scorer: Scorer,
    adapters: list[Adapters],
    tokens_T: Tensor,
    context: int,
    kept: int,
    config: KVDistillConfig,
    whole_C: Tensor | None = None,
) -> Streams:
    """Teacher and student of one window.

    Args:
        context: C, the first tokens of the window; the others are instruction and answer.
        kept: tokens of the context that stay, in all.
        whole_C: bool, context tokens that must stay, besides the first `config.always_keep`.
    """
    T, C = len(tokens_T), context
    place = torch.arange(T)
    causal = torch.ones(T, T, dtype=model.embedding_VM.dtype).tril()

    h = model.embedding_VM[tokens_T]
    for number, layer in enumerate(model.layers):
        if number == config.scorer_layer:
            score = scorer(h[None, :C])[0]
        h, _ = layer_rows(model, layer, h, place, None, causal)
    if config.scorer_layer == len(model.layers):
        score = scorer(h[None, :C])[0]
    teacher = model.logits(h)

    everything = torch.ones(1, C, dtype=torch.bool)
    whole = always_kept(everything, config.always_keep)[0]
    if whole_C is not None:
        whole = whole | whole_C
    chosen = choose(score[None], everything, torch.tensor([kept]), whole[None])[0]
    routed = chosen if config.routing else everything[0]
    gate = slot_gates(score, chosen, whole, dropped_gradient=config.dropped_slot_gradient)

    h, slots = model.embedding_VM[tokens_T[:C]], []
    for layer, adapted in zip(model.layers, adapters, strict=True):
        h, pair = layer_rows(model, layer, h, place[:C], None, causal[:C, :C], adapted, routed)
        slots.append(pair)

    h = model.embedding_VM[tokens_T[C:]]
    weight = torch.cat([gate.to(causal).expand(T - C, C), causal[C:, C:]], 1)
    for layer, pair in zip(model.layers, slots, strict=True):
        h, _ = layer_rows(model, layer, h, place[C:], pair, weight)
    return Streams(teacher, model.logits(h), score, chosen)


def distill_loss(streams: Streams, config: KVDistillConfig) -> Tensor:
    """Mean over the rows behind the context of λ·KL(teacher ‖ student) + (1 − λ)·KL(student ‖ teacher), in nats."""
    rows = len(streams.student_TV)
    return distillation(
        streams.teacher_TV[-rows:], streams.student_TV, forward_share=config.distill_forward_share
    ).mean()
