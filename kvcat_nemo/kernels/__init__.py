"""Attention kernels behind one small protocol; the oracle in method/attention.py is the reference of every one."""

from kvcat_nemo.kernels.backends import announce, select_backend
from kvcat_nemo.kernels.gated import causal_attention, gated_attention
from kvcat_nemo.kernels.span_gated import span_gated_attention
from kvcat_nemo.kernels.window_split import WindowSplit

__all__ = [
    "WindowSplit",
    "announce",
    "causal_attention",
    "gated_attention",
    "select_backend",
    "span_gated_attention",
]
