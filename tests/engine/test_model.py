"""The paired model on one process: its two halves, its figures, its checkpoint keys, its precision, its refusals."""

import re

import pytest
import torch

from kvcat_nemo.method.losses import budget_loss, kvcat_loss
from tests.engine.small_models import (
    MODELS,
    PADDED_VOCAB,
    TOKENS,
    VOCAB,
    WINDOWS,
    build,
    enliven,
    transformer_config,
)

pytestmark = pytest.mark.usefixtures("one_process")

PAIRED = [name for name, (kvcat, *_) in MODELS.items() if kvcat.get("policy") != "none"]


@pytest.fixture
def make(one_process):
    def make(name=PAIRED[0], kvcat=None, **fields):
        model = build(transformer_config(name, kvcat, **fields), MODELS[name][2])
        enliven(model)
        return model

    return make


def batch(seed=0):
    text = torch.randint(0, VOCAB, (WINDOWS, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1], torch.arange(TOKENS).expand(WINDOWS, TOKENS), text[:, 1:]


def metrics_of(model, tokens, position, labels):
    return model(tokens, position, None, labels=labels)


@pytest.mark.parametrize("name", PAIRED)
def test_dense_half_is_a_plain_forward(make, name):
    from megatron.core.models.gpt import GPTModel

    model = make(name)
    tokens, position, labels = batch()
    paired = metrics_of(model, tokens, position, labels)
    logits = model(tokens, position, None)  # without labels: a plain GPT
    ce = -logits[..., :VOCAB].log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert paired.shape == (4, WINDOWS, TOKENS) and logits.shape == (WINDOWS, TOKENS, PADDED_VOCAB)
    torch.testing.assert_close(paired[0], ce, rtol=0, atol=1e-12)
    assert (paired[2] - ce).abs().max() > 1e-3  # the masked half does differ
    # Megatron's own class, attention and layer give the same logits from the same weights.
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

    from kvcat_nemo.engine.spec import RMSNorm

    config, tied = model.config, MODELS[name][2]
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    block = TransformerBlockSubmodules(layer_specs=[layer] * 4, layer_norm=RMSNorm)
    plain = GPTModel(
        config,
        ModuleSpec(module=TransformerBlock, submodules=block),
        vocab_size=PADDED_VOCAB,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    ).double()
    backbone = {k: v for k, v in model.state_dict().items() if ".router." not in k and v is not None}
    missing, unexpected = plain.load_state_dict(backbone, strict=False)
    assert not unexpected and all("_extra_state" in key for key in missing)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)[None, None]
    torch.testing.assert_close(plain(tokens, position, mask), logits, rtol=0, atol=1e-6)  # softmax in float32


def test_policy_none_is_dense_alone(make):
    model = make("none, untied")
    tokens, position, labels = batch()
    metrics = metrics_of(model, tokens, position, labels)
    ce = -model(tokens, position, None)[..., :VOCAB].log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    assert metrics.shape == (1, WINDOWS, TOKENS)
    torch.testing.assert_close(metrics[0], ce, rtol=0, atol=1e-12)
    assert not any(".router." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", [n for n in PAIRED if n != "attention, untied"])
def test_a_later_token_changes_no_earlier_metric(make, name):
    """Through embedding, routers, gates and both halves. H2O's mask looks ahead by its definition."""
    model = make(name)
    tokens, position, labels = batch()
    before = metrics_of(model, tokens, position, labels)
    tokens = tokens.clone()
    tokens[:, 5] = (tokens[:, 5] + 1) % VOCAB
    after = metrics_of(model, tokens, position, labels)
    torch.testing.assert_close(after[..., :5], before[..., :5], rtol=0, atol=1e-12)
    assert (after[:3, :, 5:] - before[:3, :, 5:]).abs().max() > 1e-3


def step(model, kvcat_scale=1):
    """Engine's loss of one micro-batch and its figures."""
    from kvcat_nemo.engine.collectives import set_router_loss_scale
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    set_router_loss_scale(model.config, num_microbatches=kvcat_scale)
    tokens, position, labels = batch()
    loss_mask = torch.ones_like(labels)
    loss_mask[0, 3] = 0
    loss, count, sums = microbatch_loss(
        metrics_of(model, tokens, position, labels), loss_mask, model.config.kvcat
    )
    return loss / count, loss_mask, lambda: step_metrics([sums], [model], model.config.kvcat)


@pytest.mark.parametrize("name", [n for n in PAIRED if n.startswith("router")])
def test_gradients_are_those_of_the_methods_loss(make, name):
    """The budget term rides on the layers; here all three are summed by method.losses and differentiated plainly."""
    model = make(name)
    parameters = dict(model.named_parameters())
    loss, _, _ = step(model)
    ours = torch.autograd.grad(loss, list(parameters.values()))

    routings = []
    hooks = [
        m.register_forward_hook(lambda mod, args, out: routings.append(out))
        for n, m in model.named_modules()
        if n.endswith(".router")
    ]
    main, _, _ = step(model, kvcat_scale=float("inf"))  # a scale of 0: nothing rides
    for hook in hooks:
        hook.remove()
    kvcat = model.config.kvcat
    budgets = [budget_loss(r.p_BT, r.hard_BT, kvcat.target_keep_fraction) for r in routings]
    assert len(budgets) == 2
    extra = kvcat_loss(torch.zeros(()), None, budgets, kvcat).weighted["budget"]
    alone = torch.autograd.grad(extra, list(parameters.values()), retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(main + extra, list(parameters.values()))
    for name, a, b in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13, msg=name)
    # The rider is seen: without it the routers' and the backbone's gradients would be others.
    for name, part in zip(parameters, alone, strict=True):
        if ".router." in name or name == "embedding.word_embeddings.weight":
            assert part.abs().max() > 1e-7, name


def test_figures_are_named(make):
    model = make()
    loss, loss_mask, figures = step(model)
    figures = figures()
    parts = {"anchor", "distill", "budget"}
    assert {f"loss/{p}" for p in parts} | {f"weighted/{p}" for p in parts} <= figures.keys()
    groups = {f"{m}/group{g}" for m in ("keep_rate", "probability", "budget") for g in (0, 1)}
    assert groups | {"keep_rate", "ce_masked", "top1_agreement", "loss/total", "tokens"} <= figures.keys()
    assert figures["tokens"] == loss_mask.sum()
    assert figures["weighted/budget"] == pytest.approx(0.1 * figures["loss/budget"])
    assert float(loss.detach()) == pytest.approx(figures["weighted/anchor"] + figures["weighted/distill"])
    assert figures["loss/total"] == pytest.approx(float(loss.detach()) + figures["weighted/budget"])


def test_share_of_flipped_gates(make):
    """Measured at the step after an update, on the last window's hidden states as they were before it."""
    model = make()
    assert "flipped" not in step(model)[2]()  # nothing came before the first step
    assert step(model)[2]()["flipped"] == 0  # no update
    with torch.no_grad():
        model.decoder.layers[2].router.proposal.weight.neg_()  # p → 1 − p
    figures = step(model)[2]()
    assert figures["flipped/group0"] == 0 and figures["flipped/group1"] == 1
    model.eval()
    assert "flipped" not in step(model)[2]()


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_keys(make, name):
    """Routers unstacked by group, everything else as megatron's GPTModel has it."""
    model = make(name)
    keys = {tensor.key for tensor in model.sharded_state_dict().values() if hasattr(tensor, "global_shape")}
    routers = {key for key in keys if ".router." in key}
    plain = build(transformer_config(name, {"policy": "none", "mask_per": "token"}), MODELS[name][2])
    assert keys - routers == {
        t.key for t in plain.sharded_state_dict().values() if hasattr(t, "global_shape")
    }
    names = (
        "norm.weight",
        "norm.bias",
        "q.weight",
        "k.weight",
        "v.weight",
        "o.weight",
        "proposal.weight",
        "alpha",
    )
    expected = {f"decoder.layers.router.{group}.{n}" for group in (0, 1) for n in names}
    assert routers == (expected if name.startswith("router") else set())
    shapes = {
        t.key: t.global_shape for t in model.sharded_state_dict().values() if hasattr(t, "global_shape")
    }
    if routers:
        assert tuple(shapes["decoder.layers.router.1.proposal.weight"]) == (
            32 if "KV head" in name else 16,
            16,
        )
    assert tuple(shapes["decoder.layers.mlp.linear_fc2.weight"]) == (4, 16, 24)


def test_plain_keys_are_megatrons_own(make):
    """The model without routers has the keys of GPTModel with megatron's own layers."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    # Megatron's own local norm, which it names as Transformer Engine does in checkpoints.
    config = transformer_config("none, untied", persist_layer_norm=False)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    theirs = GPTModel(config, spec, vocab_size=PADDED_VOCAB, max_sequence_length=TOKENS,
                      share_embeddings_and_output_weights=False, position_embedding_type="rope")  # fmt: skip
    key = lambda m: {t.key for t in m.sharded_state_dict().values() if hasattr(t, "global_shape")}  # noqa: E731
    assert key(make("none, untied")) == key(theirs)


def test_routers_stay_float32_in_a_bf16_model(one_process):
    from megatron.core.transformer.module import Float16Module

    config = transformer_config(dtype=torch.bfloat16, bf16=True)
    model = Float16Module(config, build(config))
    dtypes = {".router." in name: set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        dtypes[".router." in name].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    tokens, position, labels = batch()
    metrics = model(tokens, position, None, labels=labels)
    metrics[:2].mean().backward()
    assert metrics.dtype == torch.float32 and metrics.isfinite().all()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())


def test_router_marks(make):
    model = make()
    marked = {name for name, p in model.named_parameters() if getattr(p, "is_router", False)}
    assert marked == {name for name, _ in model.named_parameters() if ".router." in name} and marked


REFUSED = [
    ("attention_dropout", 0.1),
    ("hidden_dropout", 0.1),
    ("calculate_per_token_loss", True),
    ("mtp_num_layers", 1),
    ("num_moe_experts", 4),
    ("multi_latent_attention", True),
    ("fp8", "hybrid"),
    ("fp8_dot_product_attention", True),
    ("attn_logit_softcapping", 50.0),
    ("softmax_type", "learnable"),
    ("window_size", (128, 0)),
    ("enable_cuda_graph", True),
]


@pytest.mark.parametrize("field,value", REFUSED)
def test_refusals_name_the_field_and_the_value(field, value):
    from kvcat_nemo.engine.config_checks import validate_model_config

    config = transformer_config()
    validate_model_config(config)
    setattr(config, field, value)  # past Megatron's own checks: ours must hold by themselves
    with pytest.raises(ValueError, match=rf"model\.config\.{field}={re.escape(repr(value))}: ."):
        validate_model_config(config)


def test_settings_of_the_method_are_checked_too():
    from kvcat_nemo.engine.config_checks import validate_model_config

    config = transformer_config()
    config.kvcat.sinks = -1
    with pytest.raises(ValueError, match="kvcat.sinks=-1"):
        validate_model_config(config)


def test_packed_documents_are_refused(make):
    tokens, position, labels = batch()
    with pytest.raises(ValueError, match="packed_seq_params"):
        make().decoder.layers[0].self_attention.core_attention(
            *(torch.zeros(4, 2, 4, 4) for _ in range(3)), packed_seq_params=object()
        )


@pytest.mark.parametrize("source", ["masked", "dense"])
@pytest.mark.parametrize("detached", [False, True])
def test_routers_read_the_stream_that_is_asked_for(make, source, detached):
    model = make(kvcat={"router_input": source, "router_detach_input": detached})
    layer, seen = model.decoder.layers[2], {}
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(hidden=kwargs["hidden_states"]), with_kwargs=True
    )
    layer.router.register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    step(model)
    dense, masked = seen["hidden"].transpose(0, 1).chunk(2)
    assert not torch.equal(dense, masked)
    assert torch.equal(seen["h"], dense if source == "dense" else masked)
    assert seen["h"].requires_grad != detached
