"""Small GPTs in float64 for the engine's tests, and one training step of them by Megatron's own schedule."""

from __future__ import annotations

import contextlib

import torch

TOKENS, WINDOWS, MICROBATCHES = 8, 2, 4
VOCAB, PADDED_VOCAB = (
    101,
    104,
)  # 101 is not a multiple of two: at TP2 the second rank has three columns of padding

MODELS = {
    # name → (KVCatConfig fields, TransformerConfig fields, tied embeddings)
    "router, tied, q/k norms": ({"router_dim": 4}, {"qk_layernorm": True}, True),
    "router, untied, qkv bias": (
        {
            "router_dim": 4,
            "router_input": "dense",
            "sinks": 1,
            "recent_window": 2,
            "distill_temperature": 2.0,
        },
        {"add_qkv_bias": True},
        False,
    ),
    "router per KV head": (
        {
            "num_groups": 2,
            "router_dim": 4,
            "mask_per": "kv_head",
            "dropped_slot_gradient": False,
            "distill_forward_share": 0.6,
        },
        {},
        True,
    ),
    "random, tied": ({"policy": "random"}, {}, True),
    "random behind a cut, tied": (
        {
            "policy": "random",
            "mask_span": "prefix",
            "prefix_keep_min": 0.2,
            "prefix_keep_max": 0.8,
            "sinks": 1,
        },
        {},
        True,
    ),
    "attention, untied": ({"policy": "attention"}, {}, False),
    "none, untied": ({"policy": "none"}, {}, False),
}


def transformer_config(name="router, tied, q/k norms", kvcat=None, dtype=torch.float64, **fields):
    """KVCatTransformerConfig of a model; `kvcat` and `fields` go over those of MODELS."""
    from kvcat_nemo.engine.config_checks import KVCatTransformerConfig
    from kvcat_nemo.method.config import KVCatConfig

    settings, more, _ = MODELS[name]
    base = dict(
        num_layers=4,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        kvcat=KVCatConfig(**{"num_groups": 2} | settings | (kvcat or {})),
    )
    return KVCatTransformerConfig(**base | more | fields)


def build(config, tied=True, vp_stage=None, cls=None, padded_vocab=PADDED_VOCAB, max_tokens=TOKENS, **gpt):
    """KVCatGPTModel (or `cls`) of this rank's stage. Routers follow the model to float64, which casts never do."""
    from megatron.core import parallel_state

    from kvcat_nemo.engine.paired_model import KVCatGPTModel
    from kvcat_nemo.engine.spec import kvcat_block_spec

    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    if cls is None:
        cls, gpt = KVCatGPTModel, {"true_vocab_size": VOCAB} | gpt
    model = cls(
        config,
        kvcat_block_spec(config, vp_stage),
        vocab_size=padded_vocab,
        max_sequence_length=max_tokens,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        vp_stage=vp_stage,
        **gpt,
    )
    if config.params_dtype == torch.float64:
        for parameter in model.parameters():
            parameter.data = parameter.data.double()
    return model


@torch.no_grad()
def enliven(model, seed=0):
    """Weights of a model in the middle of its training: nothing is 0 or 1, gates are open and shut."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter)
        if name.endswith("router.alpha"):
            parameter.fill_(0.6)
        elif parameter.dim() < 2:
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(noise * parameter.shape[1] ** -0.5)


def microbatches(step=0, tokens=TOKENS, windows=WINDOWS, count=MICROBATCHES):
    """A step's global batch, the same for every layout: `count` × (tokens, labels, loss mask), [windows, tokens] each."""
    rng = torch.Generator().manual_seed(11 + step)
    for _ in range(count):
        text = torch.randint(0, VOCAB, (windows, tokens + 1), generator=rng)
        yield text[:, :-1], text[:, 1:], (torch.rand(windows, tokens, generator=rng) < 0.8).double()


def packed_positions(windows, tokens, number):
    """Places of the tokens in their documents, [windows, tokens]: about four documents a window, of any length."""
    rng = torch.Generator().manual_seed(100 + number)
    begins = torch.rand(windows, tokens, generator=rng) < 4 / tokens
    begins[:, 0] = True
    place = torch.arange(tokens).expand(windows, -1)
    return place - torch.where(begins, place, 0).cummax(1).values


@contextlib.contextmanager
def recorded_masks(chunks):
    """While it lasts, a dict layer → [(gate [B, T, 1 or G] that its masked attention got, whether gradients were on), …].

    Taken where attention takes them, so those that a policy makes inside attention are seen as well.
    """
    from kvcat_nemo.engine import core_attention
    from kvcat_nemo.engine.layer import kvcat_layers

    masks: dict[int, list] = {}
    running: list[int] = []
    hooks = []
    for chunk in chunks:
        for layer in kvcat_layers(chunk):
            core = layer.self_attention.core_attention
            number = layer.layer_number
            hooks.append(
                core.register_forward_pre_hook(lambda *unused, number=number: running.append(number))
            )
            hooks.append(core.register_forward_hook(lambda *unused: running.pop() and None))
    plain, behind = core_attention.gated_attention, core_attention.span_gated_attention

    def keep(q, k, v, gate_BTG, **settings):
        gate = gate_BTG.detach().clone()  # windows of packed documents come end to end
        masks.setdefault(running[-1], []).append((gate, torch.is_grad_enabled()))
        return plain(q, k, v, gate_BTG, **settings)

    def keep_spans(q, k, v, gate_BTG, *, spans, **settings):
        gate = coded(gate_BTG.detach()[..., 0], spans)[..., None]
        masks.setdefault(running[-1], []).append((gate, torch.is_grad_enabled()))
        return behind(q, k, v, gate_BTG, spans=spans, **settings)

    core_attention.gated_attention, core_attention.span_gated_attention = keep, keep_spans
    try:
        yield masks
    finally:
        core_attention.gated_attention, core_attention.span_gated_attention = plain, behind
        for hook in hooks:
            hook.remove()


def coded(gate_BT, spans):
    """Gates of 0 and 1, and where each row's span begins, as one number."""
    return gate_BT + 2 * spans.rows(gate_BT.device)[1]


def record_gates(chunks) -> dict[int, list]:
    """Layer → gates that its attention gets, one per micro-batch, as the model runs; those behind a cut as `coded`."""
    from kvcat_nemo.engine.layer import kvcat_layers

    gates: dict[int, list] = {}
    for chunk in chunks:
        for layer in kvcat_layers(chunk):

            def keep(module, args, kwargs, layer=layer):
                bias = kwargs["attention_bias"]
                gate = None if bias is None else bias.gate.detach().clone()
                if gate is not None and bias.spans is not None:
                    gate = coded(gate, bias.spans)
                gates.setdefault(layer.layer_number, []).append(gate)

            layer.self_attention.core_attention.register_forward_pre_hook(keep, with_kwargs=True)
    return gates


def train_step(chunks, config, dp_rank=0, dp=1, batch=None, held=None, packed=False):
    """Forward and backward of the global batch by Megatron's schedule; gradients are final afterwards.

    Args:
        chunks: this rank's model chunks in the DDP wrapper.
        batch: micro-batches; None: those of `microbatches`.
        held: which tokens of every window this rank holds (context parallelism); None: all.
        packed: windows are several documents (`packed_positions`).

    Returns:
        named figures of the step.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from kvcat_nemo.engine.collectives import set_router_loss_scale
    from kvcat_nemo.engine.paired_model import document_boundaries
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    mine = list(enumerate(microbatches() if batch is None else batch))[dp_rank::dp]
    windows, length = mine[0][1][0].shape
    config.finalize_model_grads_func = finalize_model_grads
    position = torch.arange(length).expand(windows, length)

    def forward_step(iterator, model):
        number, (tokens, labels, loss_mask) = next(iterator)
        set_router_loss_scale(config, len(mine))
        place, documents = position, None
        if packed:
            place = packed_positions(windows, length, number)
            documents = document_boundaries(place)
        if held is not None:
            tokens, labels, loss_mask, place = (x[:, held] for x in (tokens, labels, loss_mask, place))
        # With the mask gradients come from the losses' first sweep, without it from a second one: some of each.
        known = {"loss_mask": loss_mask} if number % 2 else {}
        out = model(tokens, place, documents, labels=labels, **known)
        return out, lambda metrics: microbatch_loss(metrics, loss_mask, config.kvcat)

    for chunk in chunks:
        chunk.zero_grad_buffer()
    iterators = [iter(mine) for _ in chunks]
    sums = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(mine),
        seq_length=length,
        micro_batch_size=2 * windows if config.kvcat.paired else windows,
        forward_only=False,
    )
    return step_metrics(sums, chunks, config.kvcat)
