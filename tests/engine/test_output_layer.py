"""The output layer as the engine uses it: tokens' losses in place of logits, without losing what Megatron expects of it."""

import pytest
import torch

from kvcat_nemo.method.config import KVCatConfig
from tests.engine.small_models import (
    MODELS,
    VOCAB,
    build,
    enliven,
    microbatches,
    train_step,
    transformer_config,
)

pytestmark = pytest.mark.usefixtures("one_process")

MODEL = next(iter(MODELS))


@pytest.fixture
def make(one_process):
    def make(name=MODEL, kvcat=None):
        model = build(transformer_config(name, kvcat), MODELS[name][2])
        enliven(model)
        return model

    return make


def run(model, given, **kwargs):
    """Loss of one micro-batch; the model is told the loss mask or not."""
    from kvcat_nemo.engine.step import microbatch_loss

    tokens, labels, mask = next(microbatches())
    known = {"loss_mask": mask} if given else {}
    position = torch.arange(tokens.shape[1]).expand(tokens.shape)
    metrics = model(tokens, position, None, labels=labels, **known, **kwargs)
    return microbatch_loss(metrics, mask, model.config.kvcat)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "weights", [{}, {"anchor_weight": 0.3, "distill_weight": 2.0}, {"distill_weight": 0.0}]
)
@pytest.mark.filterwarnings("error:token_losses")
def test_the_loss_mask_spares_a_sweep_and_changes_nothing(make, name, weights, monkeypatch):
    from kvcat_nemo.kernels.losses import token_loss

    sweeps, sweep = [], token_loss.sweep
    monkeypatch.setattr(token_loss, "sweep", lambda *a: (sweeps.append(1), sweep(*a))[1])
    model = make(name, weights)
    results, counts = [], []
    for given in (False, True):
        model.zero_grad()
        sweeps.clear()
        loss, count, _ = run(model, given)
        (0.37 * loss / count).backward()
        counts.append(len(sweeps))
        results.append([loss.detach()] + [p.grad.clone() for p in model.parameters()])
    assert counts == [2, 1]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [MODEL, "router, untied, qkv bias"])
def test_gradient_accumulation_fusion(make, name):
    """The output weight's gradient goes into main_grad itself; with the embedding's, where the weight is tied."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    results = []
    for fused in (False, True):
        model = make(name)
        ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
        model.output_layer.gradient_accumulation_fusion = fused  # a layer made so asks for apex
        figures = train_step([ddp], model.config)
        weight = model.shared_embedding_or_output_weight() if MODELS[name][2] else model.output_layer.weight
        assert weight.grad_added_to_main_grad == fused
        results.append((figures, {n: p.main_grad.clone() for n, p in model.named_parameters()}))
    (figures, plain), (figures_fused, added) = results
    assert figures == figures_fused
    for key, expected in plain.items():
        torch.testing.assert_close(added[key], expected, rtol=1e-12, atol=1e-14, msg=key)


def test_hooks_on_the_output_layer_run(make):
    """Megatron's DDP waits in them for a weight that is still being gathered."""
    model, seen = make("router, untied, qkv bias"), []
    model.output_layer.register_forward_pre_hook(lambda module, *unused: seen.append(module))
    run(model, True)
    assert seen == [model.output_layer]


def test_an_output_layer_that_does_more_is_refused(make):
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from kvcat_nemo.engine.compat.output_layer import adopt
    from kvcat_nemo.engine.output_layer import TokenLossOutputLayer

    config = make().config
    with_bias = ColumnParallelLinear(4, 4, config=config, init_method=torch.nn.init.zeros_, bias=True)

    class Adapter(ColumnParallelLinear):
        pass

    adapted = Adapter(4, 4, config=config, init_method=torch.nn.init.zeros_, bias=False)
    for layer in (with_bias, adapted):
        with pytest.raises(ValueError, match="ColumnParallelLinear without bias"):
            adopt(layer, TokenLossOutputLayer)


def test_labels_that_are_no_tokens_are_refused(make):
    """Columns of padding are no tokens."""
    model = make()
    tokens, labels, _ = next(microbatches())
    labels = labels.clone()
    labels[0, 0] = VOCAB
    position = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with pytest.raises(ValueError, match=f"labels: {VOCAB} is not a token of the vocabulary of {VOCAB}"):
        model(tokens, position, None, labels=labels)


def test_deferred_weight_gradients_are_refused():
    from kvcat_nemo.engine.config_checks import validate_model_config

    config = transformer_config()
    config.defer_embedding_wgrad_compute = True
    with pytest.raises(ValueError, match=r"model\.config\.defer_embedding_wgrad_compute=True: ."):
        validate_model_config(config)


def test_memory_of_the_losses_is_a_setting(make, monkeypatch):
    from kvcat_nemo.engine import output_layer

    seen = []
    monkeypatch.setattr(
        output_layer,
        "token_losses",
        lambda *args, real=output_layer.token_losses, **k: (seen.append(k["memory_mib"]), real(*args, **k))[
            1
        ],
    )
    run(make(kvcat={"loss_memory_mib": 7}), True)
    assert seen == [7]
    with pytest.raises(ValueError, match="kvcat.loss_memory_mib=-1: give 1 MiB or more"):
        KVCatConfig(loss_memory_mib=-1)
