"""Faults done to real training runs, and what must be true afterwards. `python -m benchmarks.faults` does them all.

A fault returns a Record: how often it was brought about, how often everything held that must hold, and what it cost:
completed checkpoints (must be none) and steps (never more than one interval between saves).
"""
