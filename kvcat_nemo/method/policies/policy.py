"""The interface of a policy: what decides which KV slots the masked pass may see.

No torch is imported here or in the policies' files before a method needs it: a configuration is read where nothing is trained.

Shapes: B windows, T tokens of a window, R layer groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kvcat_nemo.method.config import KVCatConfig


class Range(NamedTuple):
    """The values that a setting may have."""

    holds: Callable[[Any], bool]
    """Given the whole configuration: whether the setting's value is one of them."""
    fix: str
    """What to do otherwise; {field} stands for another field's value."""


class Policy:
    """A source of gates. A policy is a file with a class like this one, and a line in `kvcat_nemo.method.policies.POLICIES`.

    Gates come from one of four places: routers (`has_routers`), the window's tokens (`reads_tokens`), each layer's own attention
    (`reads_attention`), or a model of their own (`own_model`). The engine calls that place's methods, and no others.
    """

    name: ClassVar[str]
    """Value of `kvcat.policy`."""
    paired: ClassVar[bool] = True
    """Whether a masked pass runs beside the dense one."""
    has_routers: ClassVar[bool] = False
    """Whether the first layer of each group owns a router: `build_router`, `router_parameters` and `router_loss` are called."""
    reads_tokens: ClassVar[bool] = False
    """Whether gates are drawn from the tokens of a window: `window_gates` is called."""
    reads_attention: ClassVar[bool] = False
    """Whether each layer makes its gates from its own attention: `attention_gates` is called."""
    own_model: ClassVar[bool] = False
    """Whether a model of its own makes the gates (engine.kvdistill): a KV-CAT run refuses it."""
    mask_spans: ClassVar[tuple[str, ...]] = ("window",)
    """Values of `kvcat.mask_span` that it serves; `prefix` stands for rows behind a cut alone."""
    masks_per: ClassVar[tuple[str, ...]] = ("token",)
    """Values of `kvcat.mask_per` that it serves."""
    settings: ClassVar[Mapping[str, Range]] = {}
    """Fields of KVCatConfig that it alone reads, and their ranges."""

    def refuse(self, config: KVCatConfig) -> None:
        """Raise a ValueError, `kvcat.field=value: what to do`, where settings do not go together."""

    def target_keep(self, settings: Mapping[str, Any]) -> float | None:
        """The keep rate that a run aims at, of KVCatConfig's fields as a run records them; None: there is no such number."""
        return None if settings.get("mask_span") == "prefix" else settings.get("target_keep_fraction")

    def loss_weights(self, config: KVCatConfig) -> dict[str, float]:
        """The loss's terms and their weights, in the order in which they are added."""
        return {"anchor": config.anchor_weight, "distill": config.distill_weight}

    def build_router(
        self, config: KVCatConfig, hidden_size: int, group: int, kv_heads: int
    ) -> nn.Module | None:
        """The router of a layer group; its forward is that of method.router.Router."""
        return None

    def router_parameters(self, config: KVCatConfig, hidden_size: int, kv_heads: int) -> int:
        """Parameters of one router."""
        return 0

    def router_loss(self, config: KVCatConfig, kept: Tensor, probability: Tensor) -> Tensor:
        """Loss of one router and micro-batch, unweighted; `budget` of `loss_weights` weighs it.

        Args:
            kept: fraction of gates that are open, without gradient; probability: mean keep probability.
        """
        raise NotImplementedError

    def window_gates(
        self, config: KVCatConfig, tokens_BT: Tensor, position_BT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gates of every group, from whole windows.

        They must be the same at every call: each pipeline stage makes its own, and so does a run that resumes.

        Args:
            tokens_BT: token ids; position_BT: each token's place in its document, None: a window is one document.

        Returns:
            gates [R, B, T] of zeros and ones, float32; and [B, T] bool, true at the first token behind a cut, where
            `mask_span` is prefix.
        """
        raise NotImplementedError

    def attention_gates(self, config: KVCatConfig, mass_BT: Tensor, position_BT: Tensor | None) -> Tensor:
        """Gates of one layer, [B, T] of zeros and ones; how many of them are ones must not depend on the mass.

        Args:
            mass_BT: attention that each slot receives, summed over queries and heads; position_BT: as in `window_gates`.
        """
        raise NotImplementedError
