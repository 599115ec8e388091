"""Gives a Megatron model the very rotary frequencies that a rope asks for."""

from __future__ import annotations

from kvcat_nemo.models.frequencies import inverse_frequencies
from kvcat_nemo.models.rope import Rope, YarnScaling


def set_frequencies(model, rotary_dim: int, rope: Rope) -> None:
    """Replace the inverse frequencies of a GPTModel; call it before the first forward pass.

    Megatron's own llama3 scaling fixes three of the four factors, and Megatron has none of the linear kind.

    Args:
        model: a GPTModel with position_embedding_type "rope", any stage of a pipeline.
        rotary_dim: dimensions of a head that are rotated.

    Raises:
        ValueError: for yarn, which scales cosines and sines too; a GPTModel does not.
    """
    if isinstance(rope.scaling, YarnScaling):
        raise ValueError("rope_type 'yarn': training and conversion support default, linear and llama3")
    rotary = model.rotary_pos_emb
    frequencies = inverse_frequencies(rotary_dim, rope.theta, rope.scaling)
    if rotary.inv_freq.shape != frequencies.shape:
        raise ValueError(
            f"the model rotates {2 * rotary.inv_freq.numel()} dimensions of a head, its rope has {rotary_dim}"
        )
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
    rotary.seq_len_interpolation_factor = None  # it would stretch the positions a second time
