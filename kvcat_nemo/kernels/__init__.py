"""Attention kernels behind one small protocol; the oracle in method/attention.py is the reference of every one."""

from kvcat_nemo.kernels.backends import announce, select_backend
from kvcat_nemo.kernels.gated import causal_attention, gated_attention

__all__ = ["announce", "causal_attention", "gated_attention", "select_backend"]
