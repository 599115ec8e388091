"""Attention kernels behind one small protocol; the oracle in method/attention.py is the reference of every one."""

from kvcat_nemo.kernels.attention.context_parallel import WindowSplit
from kvcat_nemo.kernels.attention.gated import causal_attention, gated_attention
from kvcat_nemo.kernels.attention.span_gated import span_gated_attention
from kvcat_nemo.kernels.fused.selection import announce, select_backend

__all__ = [
    "WindowSplit",
    "announce",
    "causal_attention",
    "gated_attention",
    "select_backend",
    "span_gated_attention",
]
