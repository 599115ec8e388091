"""Which queries a gate applies to: documents cut into spans, and rows of a span see the slots before it through their gates.

    rows      first … cut − 1                   cut … end
    see       every earlier slot, plainly       slots first … cut − 1 through their gates, slots cut … own one plainly

A document may be cut several times: a row of a span sees the slots of all earlier spans of its document through their
gates, and those of its own span plainly. Rows before the first cut are those of plain causal attention.

Shapes: B windows, T tokens of a window, C cuts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Rows `start` … `end` − 1 of a window: they see slots `first` … `start` − 1 through gates, and `start` … i plainly."""

    window: int
    first: int
    """First slot of the document."""
    start: int
    end: int

    @property
    def behind(self) -> bool:
        """Whether its rows see any slot through a gate."""
        return self.start > self.first


@dataclass(frozen=True)
class Spans:
    """The spans of B windows of T tokens, in order; every token belongs to one."""

    windows: int
    tokens: int
    spans: tuple[Span, ...]

    @classmethod
    def from_cuts(
        cls,
        cuts: Sequence[Iterable[int]] | Tensor,
        tokens: int,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> Spans:
        """Spans from where windows are cut.

        Args:
            cuts: of each window the places, 0 … T, at which it is cut, in any order: lists, or a tensor [B, C]. A place at
                which a document begins or ends cuts nothing, so 0 means "no slot is gated" and T "no row is behind a cut".
            tokens: T.
            cu_seqlens: boundaries 0 … B·T of documents in the B windows laid end to end; a cut splits the document in
                which it lies. None: a window is one document.

        Raises:
            ValueError: when a cut lies outside its window, or a document in two windows.
        """
        rows = cuts.tolist() if isinstance(cuts, Tensor) else [list(row) for row in cuts]
        bounds = range(0, (len(rows) + 1) * tokens, max(tokens, 1)) if cu_seqlens is None else cu_seqlens
        bounds = bounds.tolist() if isinstance(bounds, Tensor) else list(bounds)
        for b, row in enumerate(rows):
            for cut in row:
                if cut != int(cut) or not 0 <= cut <= tokens:
                    raise ValueError(f"cuts of window {b}: {cut} is no place in it; give 0 … {tokens}")
        spans = []
        for begin, end in zip(bounds, bounds[1:], strict=False):
            if begin == end:
                continue
            b = begin // tokens
            if end > (b + 1) * tokens:
                raise ValueError(
                    f"cu_seqlens: a document of {begin} … {end} lies in two windows of {tokens} tokens"
                )
            first, last = begin - b * tokens, end - b * tokens
            inner = sorted({int(cut) for cut in rows[b] if first < cut < last})
            spans += [Span(b, first, *pair) for pair in zip([first, *inner], [*inner, last], strict=True)]
        return cls(len(rows), tokens, tuple(spans))._checked()

    @classmethod
    def from_table(cls, table_N4: Tensor, windows: int, tokens: int) -> Spans:
        """Inverse of `table`."""
        return cls(windows, tokens, tuple(Span(*row) for row in table_N4.tolist()))

    def table(self) -> Tensor:
        """[N, 4] int64 on the CPU: (window, first, start, end) of each span. Layers hand tensors on, nothing else."""
        return torch.tensor(self.spans, dtype=torch.int64).view(-1, 4)

    def _checked(self) -> Spans:
        covered = sum(s.end - s.start for s in self.spans)
        if covered != self.windows * self.tokens:
            raise ValueError(
                f"cu_seqlens: the documents have {covered} tokens, the windows {self.windows} × {self.tokens}"
            )
        return self

    @property
    def behind(self) -> tuple[Span, ...]:
        """Spans behind a cut."""
        return tuple(s for s in self.spans if s.behind)

    def rows(self, device=None) -> tuple[Tensor, Tensor]:
        """(first_BT, start_BT), int64: row i sees slots first_i … i, those before start_i through their gates."""
        values = torch.tensor([(s.first, s.start) for s in self.spans], dtype=torch.int64)
        lengths = torch.tensor([s.end - s.start for s in self.spans], dtype=torch.int64)
        first, start = values.repeat_interleave(lengths, 0).view(self.windows, self.tokens, 2).unbind(-1)
        return first.to(device), start.to(device)

    # Kept for each device: every layer asks, and a copy from the host makes it wait for a GPU. Nobody writes into them.
    @functools.lru_cache(maxsize=64)  # noqa: B019
    def behind_BT(self, device=None) -> Tensor:
        """[B, T] bool: rows behind a cut."""
        first, start = self.rows()
        return (start > first).to(device)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def gated_BT(self, device=None) -> Tensor:
        """[B, T] bool: slots that some row sees through their gate."""
        out = torch.zeros(self.windows, self.tokens, dtype=torch.bool)
        for s in self.behind:
            out[s.window, s.first : s.start] = True
        return out.to(device)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def sinks_BT(self, sinks: int, device=None) -> Tensor:
        """[B, T] bool: the first `sinks` slots of each document."""
        first, _ = self.rows()
        return (torch.arange(self.tokens) < first + sinks).to(device)
