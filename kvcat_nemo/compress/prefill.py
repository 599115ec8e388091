"""Reading a context into a cache, and what compressors want to know of that pass.

Shapes: B rows, T tokens (rows padded at the end), H query heads, G KV heads, D head dim, M hidden size, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcat_nemo.compress.cache import KVCache, LayerCache
from kvcat_nemo.compress.compat import attention_modules
from kvcat_nemo.compress.context_limit import check_positions
from kvcat_nemo.compress.fit import remember
from kvcat_nemo.compress.hf_attention import causal, check_model, run

NEEDS = ("queries", "attention", "hidden_states")
"""What a compressor may declare it needs beyond the cache, the tokens and the model."""
_BLOCK = 256


@dataclass
class Prefilled:
    """A context that was read: its full cache, and what was recorded on the way."""

    model: PreTrainedModel
    ids_BT: Tensor
    """Tokens, padded at the end with anything."""
    cache: KVCache
    """Every token's slot, in every layer; `cache.lengths_B` tokens of each row are real."""
    logits_BV: Tensor
    """Of each row's last token: they predict the first token after the context."""
    scale: float
    """Softmax scale of the model's attention."""
    queries: list[Tensor] | None = None
    """Each layer's queries after the rotary embedding, [B, H, T, D] (needs "queries")."""
    attention: list[Tensor] | None = None
    """Attention mass that each slot got, summed over queries and over its KV head's query heads, [B, G, T]."""
    hidden_states: list[Tensor] | None = None
    """What each layer's attention block was given, after its norm, [B, T, M]."""

    @cached_property
    def lengths(self) -> list[int]:
        return self.cache.lengths_B.tolist()

    def row(self, b: int) -> Prefilled:
        """One row without its padding."""
        T = self.lengths[b]

        def part(tensors, dim):
            return None if tensors is None else [x[b : b + 1].narrow(dim, 0, T) for x in tensors]

        return Prefilled(
            self.model,
            self.ids_BT[b : b + 1, :T],
            self.cache.row(b),
            self.logits_BV[b : b + 1],
            self.scale,
            part(self.queries, 2),
            part(self.attention, 2),
            part(self.hidden_states, 1),
        )


def accumulated_mass(q_BHTD: Tensor, k_BGTD: Tensor, lengths_B: Tensor, scale: float) -> Tensor:
    """Attention mass per slot, [B, G, T] float32, from blocks of queries: no T×T matrix."""
    B, H, T, D = q_BHTD.shape
    G = k_BGTD.shape[1]
    q = q_BHTD.float().reshape(B, G, H // G, T, D)
    k = k_BGTD.float()[:, :, None].transpose(-1, -2)
    slot = torch.arange(T, device=q.device)
    mass = torch.zeros(B, G, T, device=q.device)
    for first in range(0, T, _BLOCK):
        query = slot[first : first + _BLOCK]
        s = (q[..., first : first + _BLOCK, :] @ k) * scale
        a = s.masked_fill(slot > query[:, None], -torch.inf).softmax(-1)
        real = (query < lengths_B[:, None]).to(a.dtype)  # padding asks nothing
        mass += torch.einsum("bgrqt,bq->bgt", a, real)
    return mass


class _Recorder:
    def __init__(self, lengths_B: Tensor, needs: frozenset[str]):
        self.lengths_B, self.needs = lengths_B, needs
        self.layers: list[LayerCache] = []
        self.queries: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.scale = 0.0

    def attend(self, layer, q, k, v, scale):
        T = k.shape[2]
        padding = torch.arange(T, device=k.device) >= self.lengths_B[:, None]
        bias = torch.zeros(k.shape[:3], device=k.device).masked_fill(padding[:, None], -torch.inf)
        self.layers.append(LayerCache(k, v, bias))
        self.scale = scale
        if "queries" in self.needs:
            self.queries.append(q)
        if "attention" in self.needs:
            self.attention.append(accumulated_mass(q, k, self.lengths_B, scale))
        return causal(q, k, v, scale)


def check_ids(ids: Iterable[int], vocabulary: int, what: str) -> list[int]:
    """Token ids as a list of whole numbers.

    Raises:
        ValueError: something that is no id of the vocabulary.
    """
    out = []
    for place, token in enumerate(ids):
        try:
            out.append(operator.index(token))
        except TypeError:
            out.append(-1)
        if not 0 <= out[-1] < vocabulary:
            raise ValueError(
                f"{what}[{place}] = {token!r}: must be a token id, a whole number from 0 to {vocabulary - 1}"
            )
    return out


def pad_rows(rows: Iterable[list[int]], device=None) -> tuple[Tensor, Tensor]:
    """Token lists of unequal lengths as ids [B, T], padded at the end with zeros, and lengths [B].

    Raises:
        ValueError: on an empty row.
    """
    rows = [list(row) for row in rows]
    if not rows or not all(rows):
        raise ValueError("context: every row needs at least one token; an empty document has no cache")
    T = max(map(len, rows))
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)


@torch.no_grad()
def prefill(model: PreTrainedModel, rows: Iterable[list[int]], *, needs: Iterable[str] = ()) -> Prefilled:
    """Read contexts, one a row, in one forward pass.

    Args:
        rows: token ids of each row; lengths may differ.
        needs: of NEEDS, what to record.

    Raises:
        ValueError: on an unsupported model, an empty context, one that is too long for the model, or an unknown need.
    """
    check_model(model)
    needs = frozenset(needs)
    if unknown := needs - set(NEEDS):
        raise ValueError(f"needs={sorted(unknown)}: choose among {', '.join(NEEDS)}")
    device = model.get_input_embeddings().weight.device
    rows = [check_ids(row, model.config.vocab_size, "context") for row in rows]
    ids, lengths = pad_rows(rows, device)
    B, T = ids.shape
    check_positions(model.config, [T], what="context", fix="shorten the context")
    # Rows share the longest one's rotary frequencies: each must go with them.
    more = [T - len(row) for row in rows]
    check_positions(
        model.config, [len(row) for row in rows], more, what="padded context", fix="give such rows apart"
    )
    hidden: list[Tensor] = []
    hooks = []
    if "hidden_states" in needs:
        hooks = [
            module.register_forward_pre_hook(
                lambda module, args, kwargs: hidden.append(kwargs["hidden_states"]), with_kwargs=True
            )
            for module in attention_modules(model)
        ]
    recorder = _Recorder(lengths, needs)
    try:
        positions = torch.arange(T, device=device).expand(B, T)
        last = 1 if bool((lengths == T).all()) else T
        logits = run(model, ids, positions, recorder, logits=last)
    finally:
        for hook in hooks:
            hook.remove()
    logits = logits[:, -1] if last == 1 else logits[torch.arange(B, device=device), lengths - 1]
    return Prefilled(
        model,
        ids,
        KVCache(recorder.layers, lengths, remember(model)),
        logits,
        recorder.scale,
        recorder.queries or None,
        recorder.attention or None,
        hidden or None,
    )
