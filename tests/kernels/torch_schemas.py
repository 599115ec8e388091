"""Schemas of PyTorch's flash-attention operators, copied from each release's own wheel.

Source: `torchgen/packaged/ATen/native/native_functions.yaml` in the wheels of torch 2.9.1, 2.10.0, 2.11.0, 2.12.0 and
2.13.0. The shapes of what they return are those of `meta__flash_attention_forward` in the same wheels'
torch/_meta_registrations.py: log-sum-exps [B, H, T], of packed documents [H, T]. These five agree in that.
"""

_FORWARD = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, "
    "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None{more}) "
    "-> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
)
_BACKWARD = (
    "aten::_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
    "Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
)
_UP_TO_2_11 = _FORWARD.format(more="")
_FROM_2_12 = _FORWARD.format(more=", Tensor? block_table=None, int? num_splits=None")

SCHEMAS = {
    (2, 9): (_UP_TO_2_11, _BACKWARD),
    (2, 10): (_UP_TO_2_11, _BACKWARD),
    (2, 11): (_UP_TO_2_11, _BACKWARD),
    (2, 12): (_FROM_2_12, _BACKWARD),
    (2, 13): (_FROM_2_12, _BACKWARD),
}
"""Minor version → (forward, backward)."""
