"""Figures that the KV-CAT paper reports (arXiv 2605.05971), for the tables that stand beside ours.

Its models are Qwen2.5-0.5B and 1.5B; ours are other models, other text and far fewer tokens: the direction and the ratio
compare, the values do not.
"""

from __future__ import annotations

# ΔPPL of a compressed 768-token prefix under Attention Matching: keep fraction → (base, KV-CAT).
CONTINUATION_DELTA_PPL = {
    "0.5B": {0.05: (0.780, 0.461), 0.10: (0.662, 0.422), 0.20: (0.777, 0.438), 0.40: (0.592, 0.360)},
    "1.5B": {0.05: (0.573, 0.292), 0.10: (1.027, 0.320)},
}
CONTINUATION_KL_AT_5 = (0.0562, 0.0385)
CONTINUATION_TOP1_AT_5 = (88.5, 91.1)
# Needle accuracy in per cent, keep fraction → (base, KV-CAT).
NEEDLE = {
    "0.5B": {0.30: (23, 34), 0.35: (21, 32), 0.40: (24, 38), 0.50: (28, 47)},
    "1.5B": {0.30: (41, 44), 0.35: (46, 54), 0.40: (42, 55), 0.50: (49, 67)},
}
LONGBENCH_V2 = {0.10: (22.2, 30.3), 0.20: (22.2, 30.8), 0.50: (25.3, 31.2)}
# 0.5B, accuracy in per cent: (base, KV-CAT).
BASE_ABILITY = {
    "hellaswag": (54.6, 53.6),
    "winogrande": (52.9, 54.1),
    "piqa": (70.4, 72.1),
    "openbookqa": (38.2, 37.4),
    "arc_easy": (60.8, 63.6),
    "arc_challenge": (32.2, 32.4),
    "mean": (51.5, 52.2),
}
