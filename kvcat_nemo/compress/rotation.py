"""Keys and queries moved to other positions of the text: the rotary embedding is a rotation, so moves add up."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def rotated(x: Tensor, by: int, model: PreTrainedModel) -> Tensor:
    """Keys or queries, rotary embedding applied, as they would be `by` positions later (earlier where `by` is negative).

    Angles are formed in float64: at 8,192 positions a float32 angle is off by up to 5e-4. YaRN's factor of the cosines
    is a plain factor and stays in x.

    Args:
        x: [..., D] of a model whose rotary frequencies do not depend on the length of the text (attention.check_model).
    """
    angle = by * model.model.rotary_emb.inv_freq.to(x.device).double()
    cos, sin = (torch.cat([f, f]).to(x.dtype) for f in (angle.cos(), angle.sin()))
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat([-two, one], -1) * sin
