"""The router: proposes, per token, whether the token's KV slot is kept. METHOD: KV-CAT §router, arXiv 2605.05971.

Shapes: B batch, T tokens, M model width, P proposals for a token: one, or one per KV head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvcat_nemo.method.config import KVCatConfig
from kvcat_nemo.method.linear_attention import Segments, chunked_linear_attention


@dataclass
class Routing:
    """What a router says of a window, each [batch, tokens], or [batch, tokens, KV heads] with a mask per KV head."""

    p_BT: Tensor
    """Keep probability."""
    hard_BT: Tensor
    """1 where p > ½, else 0; no gradient."""
    dropped_gradient: bool = True
    """Whether the gates of dropped slots pass their gradient on."""

    @property
    def gate_BT(self) -> Tensor:
        """The hard gate in value, the probability in gradient (straight-through)."""
        # (p − stopgrad p) first: it is exactly 0, so the gate is exactly 0 or 1.
        through = self.p_BT - self.p_BT.detach()
        return self.hard_BT + (through if self.dropped_gradient else through * self.hard_BT)


def elu_plus_one(x: Tensor) -> Tensor:
    return F.elu(x) + 1


class Router(nn.Module):
    """p_t = (1 − ⟨u, w⟩)/2 with u = normalize(W_P h), w = normalize(h + α·a), a = causal linear attention of h.

    Parameters stay in float32 whatever the model is cast to: at the initial point p = 1 the gradient of the cosine
    is zero but for rounding, and bf16 would leave nothing of it.
    """

    def __init__(self, hidden_size: int, config: KVCatConfig, group: int, kv_heads: int | None = None):
        """Args: kv_heads: of the whole model, when `config.mask_per` asks for a mask per KV head."""
        super().__init__()
        dim = config.router_dim
        self.hidden_size = hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.q = nn.Linear(hidden_size, dim, bias=False)
        self.k = nn.Linear(hidden_size, dim, bias=False)
        self.v = nn.Linear(hidden_size, dim, bias=False)
        self.o = nn.Linear(dim, hidden_size, bias=False)
        self.proposals = None
        if config.mask_per == "kv_head":
            if not kv_heads:
                raise ValueError("kvcat.mask_per=kv_head: the router must know the number of KV heads")
            self.proposals = kv_heads
        self.proposal = nn.Linear(hidden_size, (self.proposals or 1) * hidden_size, bias=False)
        self.dropped_gradient = config.dropped_slot_gradient
        self.alpha = nn.Parameter(torch.zeros(()))
        self.reset_parameters(config, group)

    @torch.no_grad()
    def reset_parameters(self, config: KVCatConfig, group: int) -> None:
        """Initialise from the config's seed and the group's number alone, so every rank draws the same values."""
        rng = torch.Generator().manual_seed(config.seed * 1009 + group)
        for linear in (self.q, self.k, self.v, self.o):
            linear.weight.copy_(
                torch.randn(linear.weight.shape, generator=rng) / math.sqrt(linear.in_features)
            )
        heads = range(self.proposals or 1)
        self.proposal.weight.copy_(
            torch.cat([initial_proposal(self.hidden_size, config, rng) for _ in heads])
        )

    def _apply(self, fn, recurse=True):
        # Follow moves between devices, but not casts to half precision.
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)

    def forward(
        self, h_BTM: Tensor, segments: Segments | None = None, position_BT: Tensor | None = None
    ) -> Routing:
        """Hidden states entering the group's first layer, [batch, tokens, width] → `Routing` of the same tokens.

        Args:
            segments: how these tokens are parts of a longer window (method.linear_attention); None: they are all of it.
            position_BT: each token's place in its document; None: a window is one document.
        """
        with torch.autocast(h_BTM.device.type, enabled=False):
            h = h_BTM.to(self.proposal.weight.dtype)
            x = self.norm(h)
            q, k, v = elu_plus_one(self.q(x)), elu_plus_one(self.k(x)), self.v(x)
            a = self.o(chunked_linear_attention(q, k, v, segments=segments, position_BT=position_BT))
            u, w = self.proposal(h), F.normalize(h + self.alpha * a, dim=-1)
            if self.proposals is not None:
                u, w = u.unflatten(-1, (self.proposals, -1)), w[..., None, :]
            p = (1 - (F.normalize(u, dim=-1) * w).sum(-1)) / 2
        return Routing(p, (p > 0.5).to(p.dtype).detach(), self.dropped_gradient)


def initial_proposal(hidden_size: int, config: KVCatConfig, rng: torch.Generator) -> Tensor:
    """W_P at step 0: every token starts with keep probability `router_init_keep`, but for the jitter.

    The paper's is −I (p = 1). In general W_P = c·I + s·R with R a quarter turn in random planes, which is orthogonal
    to its input: ⟨W_P h, h⟩/‖W_P h‖‖h‖ = c = 1 − 2p for every h, and away from p = 1 its gradient is not zero.
    """
    if hidden_size % 2:
        raise ValueError(f"hidden_size={hidden_size}: the router needs an even width")
    cos = 1 - 2 * config.router_init_keep
    order = torch.randperm(hidden_size, generator=rng)
    i, j = order[::2], order[1::2]
    turn = torch.zeros(hidden_size, hidden_size)
    turn[i, j], turn[j, i] = 1.0, -1.0
    jitter = torch.randn(hidden_size, hidden_size, generator=rng) / math.sqrt(hidden_size)
    return cos * torch.eye(hidden_size) + math.sqrt(1 - cos * cos) * turn + config.router_init_jitter * jitter
