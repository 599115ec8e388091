"""Weights of a checkpoint for a model of other layers: Transformer Engine's, Megatron's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXTRA = "_extra_state"
"""End of the names of Transformer Engine's FP8 scales, which Megatron's own layers neither write nor have."""


def load_weights(model, folder: Path | str) -> None:
    """Load all weights of a distributed checkpoint, whichever layers wrote it.

    Raises:
        ValueError: as load_into does.
    """
    from megatron.core import dist_checkpointing

    wanted = {name: x for name, x in model.sharded_state_dict().items() if not name.endswith(EXTRA)}
    load_into(model, dist_checkpointing.load(wanted, str(folder)))


def load_into(model, state: dict[str, Any]) -> None:
    """`load_state_dict`, strict about everything but extra states.

    Raises:
        ValueError: when a weight is missing, or one is there that the model does not have.
    """
    missing, extra = model.load_state_dict(state, strict=False)
    for what, names in (("misses", missing), ("does not know", extra)):
        wrong = [name for name in names if not name.endswith(EXTRA)]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ValueError(
                f"the model {what} {', '.join(wrong[:3])}{more}: the checkpoint is another model's"
            )
