"""Which of Transformer Engine's backends serves a shape: its own `get_attention_backend`, asked and remembered.

Widths by architecture: cuDNN trains multiples of 8 up to 128 everywhere, up to 256 on sm90 (equal ones, or 192 with
128), and (192, 128) and (256, 256) on sm100. Ampere's wider heads and its packed documents go to FlashAttention-2.
Nothing of this is written down here: the selection itself is asked, so a newer Transformer Engine's rules hold.

Shapes: D width of queries and keys, E width of values.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from kvcat_nemo.kernels.compat.flash_packages import available
from kvcat_nemo.kernels.compat.te_package import call, engine, version
from kvcat_nemo.kernels.fused.determinism import deterministic
from kvcat_nemo.kernels.fused.flash import FlashKernel, left_of

WIDER = ((96, 96), (128, 128), (192, 192), (192, 128), (256, 256))
"""(D, E) to try, in this order, where the narrowest multiples of 8 are not taken."""

MOST_REMEMBERED = 4096


def _install() -> str:
    """What a user can do where nothing serves."""
    newest = engine()[1].FlashAttentionUtils.max_version
    return (
        f"install flash-attn 2.7.3 to {newest}, use model.config.kvcat.attention_backend=torch, or let "
        "model.config.attention_backend (auto, flash or fused) allow more: Megatron sets NVTE_FLASH_ATTN and NVTE_FUSED_ATTN by "
        "it, and stops where they say otherwise"
    )


@dataclass(frozen=True)
class Choice:
    """What Transformer Engine selected for one shape."""

    name: str
    """`cudnn`, `flash2`, `flash3`, or what cannot serve: `cudnn512`, `cudnn-sm120`, `flash4`, `unfused`, `none`."""
    backend: int | None = None
    """cuDNN's sub-backend, as Transformer Engine counts them."""

    @property
    def kernel(self) -> FlashKernel | None:
        """The flash-attn functions to call, if it is one of those."""
        if self.name not in ("flash2", "flash3"):
            return None
        # Transformer Engine looks at flash-attn-3's version alone; a beta of it has another interface, and 2 serves.
        return FlashKernel(3 if self.name == "flash3" and available(3) else 2)

    @property
    def usable(self) -> bool:
        """Whether it offers a forward and a backward of its own."""
        return self.name == "cudnn" or self.kernel is not None


def _cudnn_name(backend: int, packed: bool) -> str:
    """Whether cuDNN's kernel can be used.

    Up to 2.15 there is a second one, for up to 512 tokens, that keeps the whole T×T matrix and no lse. From 2.14 to 2.17
    packed documents on sm120 get statistics [tokens, H, 1] for a graph that writes [documents, longest, H]: it writes
    past their end (2.18 allocates what the graph writes; before 2.14 the selection itself refuses).
    """
    known = engine()[0].FusedAttnBackend
    if int(known["F16_arbitrary_seqlen"]) != backend:
        return "cudnn512"
    if packed and torch.cuda.get_device_capability() == (12, 0) and (2, 14) <= version() <= (2, 17):
        return "cudnn-sm120"
    return "cudnn"


VARIABLES = (
    "NVTE_FLASH_ATTN",
    "NVTE_FLASH_ATTN_V2",
    "NVTE_FLASH_ATTN_V3",
    "NVTE_FLASH_ATTN_V4",
    "NVTE_FUSED_ATTN",
    "NVTE_FUSED_ATTN_BACKEND",
    "NVTE_UNFUSED_ATTN",
)
"""Of the environment, what a choice hangs on. Megatron sets some of them when it builds a model, after the first question."""


def _surroundings() -> tuple:
    """What a choice hangs on beside the shape."""
    return deterministic(), *map(os.environ.get, VARIABLES)


class Selection:
    """Transformer Engine's choices, each asked for once."""

    def __init__(self):
        self._choices: dict[tuple, Choice] = {}

    def choose(
        self,
        head_dim_qk: int,
        head_dim_v: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        batch: int = 1,
        tokens: int = 4096,
        slots: int | None = None,
        heads: int = 16,
        groups: int = 16,
        window: int | None = None,
        causal: bool = True,
        documents: int = 0,
        longest: int = 0,
        scale: float = 1.0,
    ) -> Choice:
        """Ask Transformer Engine for a training backend.

        Args:
            slots: tokens of keys and values, if not as many as queries; documents > 0: packed, `longest` tokens at most.
        """
        slots = tokens if slots is None else slots
        key = (
            head_dim_qk,
            head_dim_v,
            dtype,
            batch,
            tokens,
            slots,
            heads,
            groups,
            window,
            causal,
            documents,
            longest,
            scale,
            _surroundings(),
        )
        if key not in self._choices:
            _, utils, _ = engine()
            known = {
                "qkv_dtype": dtype,
                "qkv_layout": "thd_thd_thd" if documents else "bshd_bshd_bshd",
                "batch_size": documents or batch,
                "num_heads": heads,
                "num_gqa_groups": groups,
                "max_seqlen_q": longest if documents else tokens,
                "max_seqlen_kv": longest if documents else slots,
                "num_tokens_q": tokens if documents else 0,
                "num_tokens_kv": tokens if documents else 0,
                "head_dim_qk": head_dim_qk,
                "head_dim_v": head_dim_v,
                "attn_mask_type": ("padding_causal" if documents else "causal") if causal else "no_mask",
                "window_size": (left_of(window), 0 if causal else -1),
                "bottom_right_diagonal": False,
                # Its default, "1hss" up to 2.19, rules out flash-attn: a bias, whatever its type. Its own caller passes None.
                "core_attention_bias_shape": None,
                # Its default claims a bias that wants a gradient, which rules out a deterministic cuDNN.
                "core_attention_bias_requires_grad": False,
                "deterministic": deterministic(),
                "is_training": True,
                "softmax_scale": scale,
            }
            params = call(utils.AttentionParams, {}, known)
            flash, flash_version, fused, backend, unfused, _ = utils.get_attention_backend(params)
            if fused:
                choice = Choice(_cudnn_name(int(backend), bool(documents)), int(backend))
            elif flash:
                choice = Choice(f"flash{flash_version.major}")
            else:
                choice = Choice("unfused" if unfused else "none")
            if len(self._choices) > MOST_REMEMBERED:  # packed windows bring ever new lengths
                self._choices.clear()
            self._choices[key] = choice
        return self._choices[key]

    def require(self, choice: Choice, head_dim_qk: int, head_dim_v: int, packed: bool) -> None:
        """Raise a ValueError that says what to do when that choice cannot serve."""
        if choice.usable:
            return
        capability = torch.cuda.get_device_capability()
        what = f"head dims ({head_dim_qk}, {head_dim_v}){', packed documents' if packed else ''}"
        if choice.name == "cudnn512":
            fix = "set NVTE_FUSED_ATTN_BACKEND=1"
        elif choice.name == "flash4":
            fix = "set NVTE_FLASH_ATTN_V4=0, or model.config.attention_backend=fused so that cuDNN serves"
        elif choice.name == "cudnn-sm120":
            fix = (
                "install 2.18 or later, or set model.config.attention_backend=flash so that flash-attn serves"
            )
        else:
            fix = _install()
        raise ValueError(
            f"attention_backend=te: for {what} on compute capability {capability[0]}.{capability[1]} Transformer Engine selects "
            f"{choice.name}, whose forward and backward cannot be called apart; {fix}"
        )

    def widths(self, head_dim_qk: int, head_dim_v: int) -> tuple[int, int]:
        """The narrowest widths for which Transformer Engine selects cuDNN, else those for which it selects flash-attn.

        On Ampere with flash-attn it never selects cuDNN; elsewhere cuDNN comes first even when wider.

        Raises:
            ValueError: when nothing serves, with the fix.
        """
        narrow = tuple(-(-width // 8) * 8 for width in (head_dim_qk, head_dim_v))
        both = (max(narrow),) * 2
        candidates = dict.fromkeys(
            pair for pair in (narrow, both, *WIDER) if pair[0] >= head_dim_qk and pair[1] >= head_dim_v
        )
        choices = {pair: self.choose(*pair) for pair in candidates}
        cudnn = [pair for pair, choice in choices.items() if choice.name == "cudnn"]
        usable = [pair for pair, choice in choices.items() if choice.usable]
        if cudnn:
            return cudnn[0]
        if not usable:
            capability = torch.cuda.get_device_capability()
            raise ValueError(
                f"attention_backend=te: Transformer Engine has no kernel for head dims ({head_dim_qk}, {head_dim_v}), padded or "
                f"not, on compute capability {capability[0]}.{capability[1]}; {_install()}"
            )
        return usable[0]
