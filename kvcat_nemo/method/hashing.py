"""Numbers in [0, 1) from hashes: draws without generator state, the same on every rank and after every resume."""

from kvcat_nemo.method.random_draws import _uniform as uniform

__all__ = ["uniform"]
