"""What must be right before a run is worth starting: the machine (machine.py), and with --gpu the GPUs (gpu.py)."""

from kvcat_nemo.doctor.machine import BROKEN, GOOD, NOTE, OPTIONAL, PINS, Verdict, examine

__all__ = ["BROKEN", "GOOD", "NOTE", "OPTIONAL", "PINS", "Verdict", "examine"]
