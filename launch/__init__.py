"""Starts runs: torchrun, Slurm, Kubernetes. Knows commands, nodes and files, and nothing of the method."""

from pathlib import Path

HERE = Path(__file__).parent
"""Folder of the launch scripts."""
