"""KV-Distill (arXiv 2503.10337) as equations: a scorer chooses tokens of a context, routed adapters fill their KV slots.

The paper is silent on several points. Each of them is a field of `KVDistillConfig` whose docstring begins with "Ours".
"""

from kvcat_nemo.method.kvdistill.config import KVDistillConfig
from kvcat_nemo.method.kvdistill.lora import RoutedLoRA
from kvcat_nemo.method.kvdistill.scorer import Scorer
from kvcat_nemo.method.kvdistill.selection import choose, draw_keep_fraction, slot_gates

__all__ = ["KVDistillConfig", "RoutedLoRA", "Scorer", "choose", "draw_keep_fraction", "slot_gates"]
