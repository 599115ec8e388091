"""KV-Distill on Megatron, one process: the paired batch against the oracle's three passes, figures and gradients."""

import pytest
import torch

from kvcat_nemo.method.kvdistill import RoutedLoRA, Scorer
from kvcat_nemo.method.kvdistill.reference import Adapters, Decoder, Layer, distill_loss, three_streams
from tests.engine.kvdistill_models import TOKENS, distill_config, model_of
from tests.engine.small_models import VOCAB

pytestmark = pytest.mark.usefixtures("one_process")
CONTEXTS, KEPT = (7, 3, 9), (4, 3, 5)


def batch():
    rng = torch.Generator().manual_seed(3)
    text = torch.randint(0, VOCAB, (len(CONTEXTS), TOKENS + 1), generator=rng)
    return text[:, :-1], torch.arange(TOKENS).expand(len(CONTEXTS), TOKENS), text[:, 1:]


class MegatronsAngles(Decoder):
    """Rotary angles in float32, as Megatron makes them; else the two sides would differ by 1e-6."""

    def rotated(self, x_THD, place_T):
        frequency = 1.0 / (
            10000.0 ** (torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        )
        angle = torch.outer(place_T.float(), frequency)[:, None]
        cos, sin = angle.cos().to(x_THD), angle.sin().to(x_THD)
        first, second = x_THD.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def oracle(model, distill):
    """The same weights in the reference's form; adapters and scorer are leaves of their own."""
    config = model.config
    H, G, D, F = (
        config.num_attention_heads,
        config.num_query_groups,
        config.kv_channels,
        config.ffn_hidden_size,
    )
    layers, adapters = [], []
    for layer in model.decoder.layers:
        w = dict(layer.named_parameters())
        grouped = w["self_attention.linear_qkv.weight"].detach().view(G, H // G + 2, D, -1)
        q, k, v = grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)
        gate, up = w["mlp.linear_fc1.weight"].detach().split(F)
        layers.append(
            Layer(
                w["input_layernorm.weight"].detach(), q, k, v, w["self_attention.linear_proj.weight"].detach(),
                w["pre_mlp_layernorm.weight"].detach(), gate, up, w["mlp.linear_fc2.weight"].detach(),
            )
        )  # fmt: skip
        sizes = {
            "q": (config.hidden_size, H * D),
            "k": (config.hidden_size, G * D),
            "v": (config.hidden_size, G * D),
        }
        sizes["o"] = (H * D, config.hidden_size)
        own = {}
        for name, size in sizes.items():
            own[name] = RoutedLoRA(*size, distill.lora_rank, distill.lora_scale, 0).double()
            part = "output_adapter" if name == "o" else "qkv_adapter"
            if f"{part}.{name}_down" in w:
                own[name].down.data.copy_(w[f"{part}.{name}_down"].data)
                own[name].up.data.copy_(w[f"{part}.{name}_up"].data)
        adapters.append(Adapters(**own))
    scorer = Scorer(config.hidden_size, distill)
    scorer.up.double(), scorer.down.double()
    scorer.load_state_dict(model.scorer.state_dict())
    decoder = MegatronsAngles(
        model.embedding.word_embeddings.weight.detach()[:VOCAB], layers, model.decoder.final_layernorm.weight.detach(), D,
        model.output_layer.weight.detach()[:VOCAB], config.layernorm_epsilon,
    )  # fmt: skip
    return decoder, scorer, adapters


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("dropped", [False, True])
def test_figures_and_gradients_are_the_oracles(routing, dropped, recompute):
    if recompute is not None and not (routing and dropped):
        pytest.skip("recomputation is tried with one recipe")
    distill = distill_config(routing=routing, dropped_slot_gradient=dropped)
    fields = {} if recompute is None else {"recompute_granularity": recompute}
    if recompute == "full":
        fields |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    model = model_of(distill, **fields)
    tokens, position, labels = batch()
    lengths = torch.tensor(CONTEXTS)
    behind = torch.arange(TOKENS) >= lengths[:, None]
    metrics = model(tokens, position, labels=labels, context_lengths=lengths, kept_B=torch.tensor(KEPT))
    (metrics[1] * behind).sum().backward()

    decoder, scorer, adapters = oracle(model, distill)
    total = 0
    for b, context in enumerate(CONTEXTS):
        streams = three_streams(decoder, scorer, adapters, tokens[b], context, KEPT[b], distill)
        loss = distill_loss(streams, distill)
        assert float(metrics[1, b][context:].mean()) == pytest.approx(float(loss), abs=1e-12)
        total = total + loss * (TOKENS - context)
    total.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        if name.startswith("scorer."):
            theirs = scorer.get_parameter(name.removeprefix("scorer."))
        else:
            _, _, number, _, last = name.split(".")
            projection, part = last.split("_")
            theirs = getattr(getattr(adapters[int(number)], projection), part)
        assert parameter.grad.abs().max() > 0, name
        off = (parameter.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert float(off) < 1e-10, (name, float(off))
        compared += 1
    assert compared == 4 + 3 * 8 + 4


def test_the_exported_adapter_answers_alike_on_the_hugging_face_model(tmp_path):
    """Cross-entropies of the answers' tokens: Megatron's student against the plain model after a compressed cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvcat_nemo.compress import next_logits
    from kvcat_nemo.compress.kvdistill import encode, load_adapter, save_adapter
    from kvcat_nemo.conversion.kvdistill import adapter_of

    distill = distill_config(keep_gate_at_inference=True)
    model = model_of(distill)
    c = model.config
    decoder, _, _ = oracle(model, distill)
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=c.hidden_size, intermediate_size=c.ffn_hidden_size, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_query_groups, head_dim=c.kv_channels,
            rms_norm_eps=c.layernorm_epsilon, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    names = {
        "norm_M": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.o_proj", "mlp_norm_M": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }  # fmt: skip
    state = {"model.embed_tokens.weight": decoder.embedding_VM, "lm_head.weight": decoder.output_VM}
    state["model.norm.weight"] = decoder.norm_M
    for number, layer in enumerate(decoder.layers):
        state |= {
            f"model.layers.{number}.{theirs}.weight": getattr(layer, ours) for ours, theirs in names.items()
        }
    plain.load_state_dict(state)
    save_adapter(adapter_of(model), tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter")
    tokens, position, labels = batch()
    with torch.no_grad():
        metrics = model(
            tokens, position, labels=labels, context_lengths=torch.tensor(CONTEXTS), kept_B=torch.tensor(KEPT)
        )
        for b, context in enumerate(CONTEXTS):
            cache = encode(plain, tokens[b, :context], KEPT[b], adapter)
            logits = next_logits(plain, cache, tokens[b : b + 1, context:])[0]
            ce = torch.nn.functional.cross_entropy(logits, labels[b, context:], reduction="none")
            torch.testing.assert_close(ce.double(), metrics[2, b, context:].double(), rtol=0, atol=1e-4)


def test_what_is_trained_is_small_and_the_rest_has_no_gradient():
    model = model_of(distill_config())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("adapter" in name or name.startswith("scorer.") for name in trained)
    assert not any(
        "decoder.layers.3.output_adapter" in n or "decoder.layers.3.qkv_adapter.q_" in n for n in trained
    )


def test_refusals():
    model = model_of(distill_config())
    tokens, position, labels = batch()
    for lengths, words in (
        (None, "needs the length"),
        ([0, 3, 3], r"give 1 … 11"),
        ([3, 3, 12], r"give 1 … 11"),
    ):
        with pytest.raises(ValueError, match=f"context_lengths.*{words}"):
            model(
                tokens,
                position,
                labels=labels,
                context_lengths=None if lengths is None else torch.tensor(lengths),
            )
    with pytest.raises(ValueError, match="packed documents are not supported"):
        model(tokens, position, torch.tensor([0, 36]), labels=labels, context_lengths=torch.tensor(CONTEXTS))
    with pytest.raises(ValueError, match="scorer_layer=5: the model has 4 layers"):
        model_of(distill_config(scorer_layer=5))


def test_a_kv_cat_run_refuses_its_gates_and_too_long_contexts_are_refused():
    from kvcat_nemo.engine.config_checks import validate_model_config
    from tests.engine.small_models import build, transformer_config

    config = transformer_config(
        "none, untied", kvcat={"policy": "scorer", "mask_span": "prefix", "num_groups": 1}
    )
    for start in (lambda: validate_model_config(config), lambda: build(config, False)):
        with pytest.raises(ValueError, match="policy='scorer'.*only a KV-Distill model makes these gates"):
            start()
    model = model_of(distill_config(context_window=6))
    tokens, position, labels = batch()
    with pytest.raises(ValueError, match=r"context_lengths \[7, 3, 9\]: above kvdistill.context_window=6"):
        model(tokens, position, labels=labels, context_lengths=torch.tensor(CONTEXTS))
