"""KV-Distill's equations: choice, gates, adapters, and the three streams against finite differences and one student stream."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvcat_nemo.method.attention import span_gated_attention_reference
from kvcat_nemo.method.kvdistill import (
    KVDistillConfig,
    RoutedLoRA,
    Scorer,
    choose,
    draw_keep_fraction,
    slot_gates,
)
from kvcat_nemo.method.kvdistill.reference import (
    Adapters,
    Decoder,
    Layer,
    distill_loss,
    rms_norm,
    three_streams,
)
from kvcat_nemo.method.kvdistill.selection import always_kept, kept_tokens
from kvcat_nemo.method.spans import Spans

M, H, G, D, V, LAYERS, T, C = 16, 4, 2, 4, 23, 3, 13, 8


def setup(**fields):
    config = KVDistillConfig(scorer_layer=1, lora_rank=3, lora_alpha=3.0, always_keep=1, **fields)
    rng = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64) / shape[-1] ** 0.5

    layers = [
        Layer(
            1 + drawn(M), drawn(H * D, M), drawn(G * D, M), drawn(G * D, M), drawn(M, H * D),
            1 + drawn(M), drawn(24, M), drawn(24, M), drawn(M, 24),
        )
        for _ in range(LAYERS)
    ]  # fmt: skip
    model = Decoder(drawn(V, M) * 4, layers, 1 + drawn(M), D)
    sizes = {"q": (M, H * D), "k": (M, G * D), "v": (M, G * D), "o": (H * D, M)}
    adapters = [
        Adapters(
            **{
                n: RoutedLoRA(*s, config.lora_rank, config.lora_scale, 7 * i).double()
                for n, s in sizes.items()
            }
        )
        for i in range(LAYERS)
    ]
    with torch.no_grad():  # B is 0 at step 0, which would hide A's gradient
        for x in modules(adapters):
            x.up.copy_(drawn(*x.up.shape))
    scorer = Scorer(M, config)
    scorer.up.double(), scorer.down.double()
    tokens = torch.randint(V, (T,), generator=rng)
    return config, model, scorer, adapters, tokens


def modules(adapters):
    return [getattr(a, name) for a in adapters for name in "qkvo"]


def trained(scorer, adapters):
    return [*scorer.parameters(), *(p for x in modules(adapters) for p in x.parameters())]


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("routing", [True, False])
def test_gradients_equal_finite_differences(share, routing):
    """Scorer (through σ of chosen tokens), the four adapters of every layer, both directions of the KL."""
    config, model, scorer, adapters, tokens = setup(distill_forward_share=share, routing=routing)
    parameters = trained(scorer, adapters)

    def loss():
        return distill_loss(three_streams(model, scorer, adapters, tokens, C, 4, config), config)

    loss().backward()
    unused = [p for x in (adapters[-1].q, adapters[-1].o) for p in x.parameters()]
    assert all(p.grad is None for p in unused), (
        "no answer reads what the last layer gives for a context's rows"
    )
    parameters = [p for p in parameters if all(p is not u for u in unused)]
    rng = torch.Generator().manual_seed(1)
    for p in parameters:
        direction = torch.randn(p.shape, generator=rng, dtype=p.dtype)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                p += sign * 1e-5 * direction
                values.append(loss())
                p -= sign * 1e-5 * direction
        numeric = (values[0] - values[1]) / 2e-5
        assert float((p.grad * direction).sum() - numeric) == pytest.approx(
            0, abs=3e-8 + 1e-6 * abs(float(numeric))
        )
    assert all(p.grad.norm() > 0 for p in parameters)


def test_one_student_stream_is_the_context_pass_and_the_answer_pass():
    """Rows of both in one stream: adapters act by row, and a gate behind the cut alone says what the answer sees."""
    config, model, scorer, adapters, tokens = setup()
    streams = three_streams(model, scorer, adapters, tokens, C, 4, config)
    context = torch.arange(T) < C
    chosen = torch.zeros(T, dtype=torch.bool)
    chosen[:C] = streams.chosen_C
    whole = always_kept(context[None], config.always_keep)[0]
    score = torch.zeros(T, dtype=torch.float64)
    score[:C] = streams.score_C
    gate = slot_gates(score, chosen, whole, dropped_gradient=False)
    spans = Spans.from_cuts([[C]], T)
    h = model.embedding_VM[tokens]
    for layer, adapted in zip(model.layers, adapters, strict=True):
        x = rms_norm(h, layer.norm_M)
        q = x @ layer.q.T + adapted.q(x, chosen)
        k, v = x @ layer.k.T + adapted.k(x, context), x @ layer.v.T + adapted.v(x, context)
        q, k, v = (y.unflatten(-1, (-1, D)) for y in (q, k, v))
        q, k = (model.rotated(y, torch.arange(T)) for y in (q, k))
        a = span_gated_attention_reference(
            q[None], k[None], v[None], gate[None, :, None], spans=spans, scale=D**-0.5, gradient_cap=80.0
        )[0].flatten(1)
        h = h + a @ layer.o.T + adapted.o(a, chosen)
        x = rms_norm(h, layer.mlp_norm_M)
        h = h + (torch.nn.functional.silu(x @ layer.gate.T) * (x @ layer.up.T)) @ layer.down.T
    logits = rms_norm(h, model.norm_M) @ model.embedding_VM.T
    torch.testing.assert_close(logits[C:], streams.student_TV, rtol=0, atol=1e-12)


def test_untrained_adapters_and_everything_kept_are_the_teacher():
    """B = 0, and every gate 1: the student is the teacher."""
    config, model, scorer, adapters, tokens = setup()
    with torch.no_grad():
        for x in modules(adapters):
            x.up.zero_()
    everything = torch.ones(C, dtype=torch.bool)
    streams = three_streams(model, scorer, adapters, tokens, C, C, config, whole_C=everything)
    torch.testing.assert_close(streams.student_TV, streams.teacher_TV[C:], rtol=0, atol=1e-12)
    assert float(distill_loss(streams, config).detach()) == pytest.approx(0, abs=1e-12)


def test_scores_alone_decide_and_ties_go_to_the_earlier_token():
    score = torch.tensor([[0.1, 3.0, 2.0, 2.0, 9.0, float("nan"), 99.0]])
    context = torch.tensor([[True] * 6 + [False]])
    whole = torch.tensor([[True] + [False] * 6])

    def kept(n, **more):
        return choose(score, context, torch.tensor([n]), **more)[0].nonzero().flatten().tolist()

    assert kept(3) == [1, 2, 4]
    assert kept(3, whole_BT=whole) == [0, 1, 4]
    assert kept(0, whole_BT=whole) == [0], "what must stay stays"
    assert kept(99) == [0, 1, 2, 3, 4, 5], "all of a short context, and nothing behind it"


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    fraction=st.floats(0.01, 1),
    first=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_the_number_of_kept_tokens_is_exact(lengths, fraction, first, seed):
    score = torch.randn(len(lengths), 12, generator=torch.Generator().manual_seed(seed))
    context = torch.arange(12) < torch.tensor(lengths)[:, None]
    whole = always_kept(context, first)
    kept = kept_tokens(torch.full((len(lengths),), fraction, dtype=torch.float64), context)
    chosen = choose(score, context, kept, whole)
    assert not (chosen & ~context).any() and (chosen | ~whole).all()
    expected = [min(n, max(int(k), min(first, n))) for n, k in zip(lengths, kept, strict=True)]
    assert chosen.sum(1).tolist() == expected


def test_kept_fractions_are_log_uniform_and_hang_on_the_example_alone():
    ids = torch.randint(2**62, (20000,), generator=torch.Generator().manual_seed(0))
    settings = {"keep_min": 0.001, "keep_max": 0.8, "seed": 3}
    drawn = draw_keep_fraction(ids, **settings)
    assert torch.equal(drawn[7:9], draw_keep_fraction(ids[7:9], **settings))
    place = (drawn / 0.001).log() / torch.tensor(800.0, dtype=torch.float64).log()
    counts = torch.histc(place.float(), 10, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # χ² of 9 degrees, one in a thousand
    assert not torch.equal(drawn, draw_keep_fraction(ids, **settings | {"seed": 4}))


def test_gates_and_whose_gradient_reaches_the_scorer():
    score = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    chosen, whole = torch.tensor([True, False, True]), torch.tensor([False, False, True])
    for dropped in (False, True):
        gate = slot_gates(score, chosen, whole, dropped_gradient=dropped)
        assert gate.tolist() == pytest.approx([torch.tensor(2.0).sigmoid().item(), 0.0, 1.0])
        (grad,) = torch.autograd.grad(gate.sum(), score)
        assert (grad != 0).tolist() == [True, dropped, False]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scorer_layer", 0), ("scorer_layer", 1.5), ("scorer_width", -1), ("lora_rank", 0), ("lora_rank", True),
        ("lora_alpha", 0), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
        ("distill_forward_share", 1.1), ("distill_forward_share", float("nan")), ("keep_min", 0), ("keep_min", 1.5),
        ("keep_max", 0.0001), ("keep_max", float("nan")), ("always_keep", -1), ("gate_gradient_cap", 81),
        ("context_window", 4),
    ],
)  # fmt: skip
def test_refusals_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"kvdistill.{field}={value!r}".replace(".", r"\.")):
        KVDistillConfig(**{field: value})


def test_the_scorer_must_lie_in_the_model():
    KVDistillConfig(scorer_layer=6).check_layers(6)
    with pytest.raises(ValueError, match=r"scorer_layer=6: the model has 5 layers"):
        KVDistillConfig(scorer_layer=6).check_layers(5)


def test_the_scorer_stays_in_float32_and_reads_without_gradient():
    scorer = Scorer(M, KVDistillConfig()).bfloat16()
    h = torch.randn(2, 5, M, dtype=torch.bfloat16, requires_grad=True)
    score = scorer(h)
    assert score.dtype == torch.float32 and score.shape == (2, 5)
    score.sum().backward()
    assert h.grad is None and scorer.up.weight.grad.norm() > 0
