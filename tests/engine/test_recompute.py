"""Activation recomputation: the same gates, losses and gradients as without, routers' included."""

import pytest
import torch

from tests.engine.small_models import (
    MODELS,
    TOKENS,
    VOCAB,
    WINDOWS,
    build,
    enliven,
    record_gates,
    transformer_config,
)

pytestmark = pytest.mark.usefixtures("one_process")

RECOMPUTE = {
    "full, uniform 1": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full, uniform 2": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "full, block of 3": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "core_attn and mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}  # fmt: skip


def steps(name, kvcat=None, **fields):
    """Two micro-batches, an update, one more: losses, figures, gradients, gates of every run of every layer."""
    from kvcat_nemo.engine.collectives import set_router_loss_scale
    from kvcat_nemo.engine.config_checks import validate_model_config
    from kvcat_nemo.engine.step import microbatch_loss, step_metrics

    config = transformer_config(name, kvcat, **fields)
    validate_model_config(config)
    model = build(config, MODELS[name][2])
    enliven(model)
    model.train()
    gates = record_gates([model])
    rng = torch.Generator().manual_seed(0)
    position = torch.arange(TOKENS).expand(WINDOWS, TOKENS)
    losses, figures, grads = [], [], []
    for count in (2, 1):
        set_router_loss_scale(config, count)
        sums = []
        for _ in range(count):
            text = torch.randint(0, VOCAB, (WINDOWS, TOKENS + 1), generator=rng)
            metrics = model(text[:, :-1], position, None, labels=text[:, 1:])
            loss, tokens, parts = microbatch_loss(metrics, torch.ones(WINDOWS, TOKENS), config.kvcat)
            (loss / tokens / count).backward()
            losses.append(float(loss.detach()))
            sums.append(parts)
        figures.append(step_metrics(sums, [model], config.kvcat))
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.3 * parameter.grad
                parameter.grad = None
    return losses, figures, grads, gates


@pytest.fixture(scope="module")
def without(one_process):
    return {name: steps(name) for name in MODELS if name != "none, untied"}


@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize("name", [n for n in MODELS if n != "none, untied"])
def test_same_losses_figures_and_gradients(without, name, how):
    losses, figures, grads, gates = steps(name, **RECOMPUTE[how])
    losses0, figures0, grads0, gates0 = without[name]
    assert losses == losses0 and figures == figures0
    routers = 0
    for ours, theirs in zip(grads, grads0, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-12, atol=1e-14, msg=key)
            routers += ".router." in key and float(ours[key].abs().max()) > 1e-6
    assert routers > 20 or not name.startswith("router")
    # Attention ran twice where it was to be recomputed, with the very same gates.
    full = RECOMPUTE[how]["recompute_granularity"] == "full"
    for layer, seen in gates.items():
        twice = "core_attn" in how or (full and (how != "full, block of 3" or layer <= 3))
        once = gates0[layer]
        expected = [gate for gate in once for _ in range(2)] if twice else once
        assert len(seen) == len(expected) and all(map(torch.equal, seen, expected)), layer


def test_a_policy_without_gates_recomputes_too():
    plain, recomputed = steps("none, untied"), steps("none, untied", **RECOMPUTE["core_attn"])
    assert plain[0] == recomputed[0]
    for a, b in zip(plain[2], recomputed[2], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_norms_are_recomputed_with_transformer_engine_alone(one_process):
    from kvcat_nemo.engine.config_checks import validate_model_config

    config = transformer_config(recompute_granularity="selective", recompute_modules=["layernorm"])
    with pytest.raises(ValueError, match=r"recompute_modules=\['layernorm'\]: .*leave layernorm out"):
        validate_model_config(config)


def test_saved_activations_are_not_distributed(one_process):
    from kvcat_nemo.engine.config_checks import validate_model_config

    config = transformer_config(**RECOMPUTE["full, uniform 1"])
    validate_model_config(config)
    config.distribute_saved_activations = True
    with pytest.raises(ValueError, match="distribute_saved_activations=True: .*set it to False"):
        validate_model_config(config)
