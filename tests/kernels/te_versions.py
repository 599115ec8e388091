"""What Transformer Engine's compiled part does, version by version: the facts that the stand-in acts on.

Its Python layer is the real one of each version (constraints-te.txt), so that signatures, defaults and the selection's
own rules are not repeated here. What lies below was read from the sources at the versions' tags:

- FORWARD, BACKWARD, `asked`   transformer_engine/pytorch/csrc/extensions.h and extensions/attention.cpp: the arguments of
                               fused_attn_fwd, fused_attn_bwd and get_fused_attn_backend, by position;
- `rows`                       common/fused_attn/fused_attn_f16_arbitrary_seqlen.cu, fused_attn_arbitrary_seqlen_fwd: shape of
                               output_S for packed documents from cuDNN 9.6 on; get_max_tokens in common/fused_attn/utils.cu;
- `sm120_rows`                 the same function, and use_ragged_stats in fused_attn_arbitrary_seqlen_fwd_impl;
- `short_kernel`, `wide_sm100`, `judges_determinism`, `sm120`
                               common/fused_attn/fused_attn.cpp, nvte_get_fused_attn_backend;
- `bias_shape`, `pads_values`, `flash`, `flash_3`
                               pytorch/attention/dot_product_attention/utils.py and backends.py, which run here: what the
                               tests expect of them, or put on disk for them.
"""

from __future__ import annotations

from dataclasses import dataclass

_MASKS = "bias_type mask_type softmax_type"
_TENSORS = (
    "cu_q cu_kv q k v fake_dtype cu_q_padded cu_kv_padded page_table_k page_table_v s_quantizer o_quantizer"
)
_RANDOM = "bias softmax_offset rng_gen rng_elts_per_thread return_max_logit"
_HEAD = "max_seqlen_q max_seqlen_kv is_training attn_scale dropout set_zero qkv_layout"
FORWARD = {
    "2.9": f"{_HEAD} {_MASKS} window {_TENSORS} {_RANDOM}",
    "2.12": f"{_HEAD} {_MASKS} window bottom_right {_TENSORS} {_RANDOM} cuda_graph",
    "2.16": f"{_HEAD} o_format scale_inv_format {_MASKS} window bottom_right {_TENSORS} {_RANDOM} cuda_graph",
}
_BACK = "max_seqlen_q max_seqlen_kv attn_scale dropout set_zero qkv_layout"
_GIVEN = "deterministic cu_q cu_kv q k v o do fake_dtype"
_QUANTIZERS = "aux cu_q_padded cu_kv_padded s_quantizer dp_quantizer dqkv_quantizer"
BACKWARD = {
    "2.9": f"{_BACK} {_MASKS} window {_GIVEN} dqkv_dtype {_QUANTIZERS}",
    "2.12": f"{_BACK} {_MASKS} window bottom_right {_GIVEN} dqkv_dtype {_QUANTIZERS} cuda_graph",
    "2.16": f"{_BACK} o_format do_format dqkv_layout scale_inv_format do_scale_inv_format {_MASKS} window bottom_right "
    f"{_GIVEN} {_QUANTIZERS} cuda_graph",
}
_SHAPE = "num_attn_heads num_gqa_groups max_seqlen_q max_seqlen_kv head_dim_qk head_dim_v window_size_left window_size_right"
_ASKED = f"is_training qkv_dtype kv_dtype qkv_layout bias_type attn_mask_type softmax_type dropout {_SHAPE} return_max_logit"


@dataclass(frozen=True)
class Facts:
    """One minor version."""

    package: str
    """The release whose Python layer the tests run."""
    cudnn: int
    """A cuDNN of that version's time; 2.9's and 2.12's are those of the images nemo 25.11 and 26.02."""
    calls: str
    """Row of FORWARD and BACKWARD."""
    asked: str | None
    """What get_fused_attn_backend takes by position; None: one object, and the answer has a message beside it."""
    rows: str
    """Rows of packed documents' statistics: `rounded` (get_max_tokens) or `tokens`."""
    sm120_rows: str | None
    """The same on sm120: `dense` ([documents, H, longest, 1]); None: no packed documents there."""
    short_kernel: bool
    """Whether there is the kernel for up to 512 tokens, NVTE_F16_max512_seqlen."""
    wide_sm100: bool
    """Whether sm100 trains (256, 256)."""
    judges_determinism: bool
    """Whether the compiled part rules on determinism; before, the Python layer refuses it on Blackwell."""
    sm120: int
    """The least cuDNN for sm120."""
    bias_shape: str | None
    """Default of AttentionParams.core_attention_bias_shape."""
    pads_values: bool = True
    """Whether it pads values for FlashAttention-2 where widths differ; else it selects nothing there."""
    flash: str = "2.8.3"
    """A flash-attn that it takes; 2.9 takes none after 2.8.1."""
    flash_3: str = "flash_attn_interface.py"
    """Where it looks for FlashAttention-3."""


_OLD = {"pads_values": False, "flash_3": "flash_attn_3/flash_attn_interface.py"}
_19 = f"{_ASKED} cuda_graph deterministic"
FACTS = {
    (2, 9): Facts(
        "2.9.0",
        91300,
        "2.9",
        _ASKED,
        "rounded",
        None,
        True,
        False,
        False,
        90700,
        "1hss",
        **_OLD | {"flash": "2.8.1"},
    ),
    (2, 12): Facts("2.12.0", 91801, "2.12", _19, "tokens", None, True, False, True, 90700, "1hss", **_OLD),
    (2, 14): Facts("2.14.0", 92000, "2.12", _19, "tokens", None, True, False, True, 91801, "1hss", **_OLD),
    (2, 16): Facts(
        "2.16.0", 92100, "2.16", _19, "tokens", None, False, False, True, 91801, "1hss", pads_values=False
    ),
    (2, 18): Facts("2.18.0", 92400, "2.16", _19, "tokens", "dense", False, True, True, 91801, "1hss"),
    (2, 20): Facts("2.20.2", 92400, "2.16", None, "tokens", "dense", False, True, True, 91801, None),
}


def rounded(tokens: int) -> int:
    """get_max_tokens: the rows that 2.9 and 2.10 allocate for so many packed tokens."""
    if tokens <= 1024:
        return 1024
    if tokens <= 32768:
        return 1 << (tokens - 1).bit_length()
    return -(-tokens // 32768) * 32768
