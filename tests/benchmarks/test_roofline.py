"""benchmarks/roofline_counts.py: its counts against published sizes and torch's own counter; the page is what it generates."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import roofline, roofline_counts, roofline_page

ROOT = Path(__file__).parents[2]

PARAMETERS = {  # of the published checkpoints
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "SmolLM2-135M": 134_515_008,
}


@pytest.mark.parametrize("name", roofline_counts.MODELS)
def test_shapes_give_the_published_parameter_counts(name):
    assert roofline_counts.MODELS[name].parameters == PARAMETERS[name]


def test_flops_equal_torchs_count_on_a_small_model():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    m = roofline_counts.Model(2, 64, 4, 2, 16, 128, 256, qkv_bias=False)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    ids = torch.randint(256, (3, 32))
    embeds = torch.randn(3, 32, 64, requires_grad=True)  # so that the first layer's input has a gradient too
    with FlopCounterMode(display=False) as counter:
        LlamaForCausalLM(config)(inputs_embeds=embeds, labels=ids).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    batched = sum(n for op, n in counts.items() if "bmm" in str(op))
    flat = sum(counts.values()) - batched
    work = roofline_counts.parts(m, 32, kvcat=False, N=96)
    assert flat == sum(work[part].flops for part in ("projections", "MLP", "CE"))
    # Eager attention knows no causality (twice the pairs) and keeps the scores (six products instead of seven). The
    # rotary embedding's outer product is a bmm as well.
    eager = work["attention, dense"].flops * 2 * 6 / 7
    assert eager <= batched <= eager * 1.02


def test_gated_attention_differs_from_dense_by_its_widths_alone():
    m = roofline_counts.MODELS["Qwen2.5-0.5B"]
    assert m.padded == (72, 96) and roofline_counts.MODELS["Qwen2.5-7B"].padded == (136, 192)
    work = roofline_counts.parts(m, 4096)
    assert work["attention, gated"].flops == 1.5 * work["attention, dense"].flops
    assert work["attention, gated"].bytes < 1.13 * work["attention, dense"].bytes


def test_two_passes_double_what_is_shared():
    m = roofline_counts.MODELS["Qwen2.5-1.5B"]
    kvcat, plain = roofline_counts.parts(m, 1024), roofline_counts.parts(m, 1024, kvcat=False)
    for part in ("projections", "MLP"):
        assert kvcat[part].flops == 2 * plain[part].flops
    assert kvcat["CE + KL"].flops == 2 * plain["CE"].flops
    assert kvcat["optimizer"] == plain["optimizer"]


def test_widths_are_those_of_the_kernels():
    from kvcat_nemo.kernels.attention.gated_past import extra_columns
    from kvcat_nemo.kernels.fused.flash import FlashKernel

    more = extra_columns(torch.bfloat16)
    for m in roofline_counts.MODELS.values():
        widths = FlashKernel().widths(m.head_dim + more[0], m.head_dim + more[1])
        assert widths == (m.padded[0],) * 2


def test_rows_of_a_chunk_are_those_of_the_loss():
    from kvcat_nemo.kernels.losses.token_sweep import Settings, Vocabulary

    weight = torch.empty(151_936, 8, device="meta", dtype=torch.bfloat16)
    settings = Settings(Vocabulary.of(None, False, len(weight), len(weight)), True, 1.0, 1.0, 128 * 2**20)
    m = roofline_counts.MODELS["Qwen2.5-0.5B"]
    for triton in (False, True):
        rows, _ = dataclasses.replace(settings, triton=triton).rows(weight, torch.float32)
        one, two = (roofline_counts.loss(m, n * rows, 2, 128, triton).bytes for n in (1, 2))
        per_chunk = m.vocabulary * m.width * 16
        # What grows with tokens grows twice; what a chunk costs, its weight, is paid once for each.
        assert two == pytest.approx(2 * one, rel=0.01) and one > per_chunk


def test_traffic_of_a_logit_is_what_the_operations_read_and_write():
    """PyTorch's form, run operation by operation on rows of float32, and its neighbours in bf16."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from kvcat_nemo.kernels.losses.row_losses import row_losses
    from kvcat_nemo.kernels.losses.token_sweep import Settings, Vocabulary

    N, V = 4, 5000

    class Traffic(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not func.is_view and "empty" not in str(func):
                for x in (*args, *(out if isinstance(out, tuple) else (out,))):
                    if isinstance(x, torch.Tensor) and x.numel() >= N * V:
                        self.bytes += x.nbytes
            return out

    for passes in (1, 2):
        x = torch.randn(passes, N, V)
        settings = Settings(Vocabulary.of(None, False, V, V), passes == 2, 1.0, 1.0, 1 << 30)
        out, labels = torch.zeros(4, N), torch.zeros(N, dtype=torch.long)
        with Traffic() as seen:
            row_losses(x[0], x[1] if passes == 2 else None, labels, torch.ones(passes, N), settings, out)
        # Beside it: the product in bf16 is widened and narrowed, and three products write or read it.
        around = passes * ((2 + 4) + (4 + 2) + 3 * 2)
        counted = seen.bytes / (N * V) + around
        # Gathers and scatters name the whole tensor and touch a few of its numbers.
        assert (
            roofline_counts.logit_bytes(passes, False)
            <= counted
            <= roofline_counts.logit_bytes(passes, False) + 24 * passes
        )


def test_json_and_page_are_up_to_date():
    hint = "run python -m benchmarks.roofline"
    assert json.loads(roofline.OUT.read_text()) == json.loads(json.dumps(roofline_counts.result())), hint
    page = roofline.PAGE.read_text(encoding="utf-8")
    assert roofline_page.rendered(page) == page, hint
    assert "never measured" in page


def test_a_page_without_a_block_is_refused():
    page = roofline.PAGE.read_text(encoding="utf-8").replace("<!-- roofline: losses -->", "")
    with pytest.raises(ValueError, match="losses"):
        roofline_page.rendered(page)


def test_measured_shares_are_set_beside_the_computed_ones(tmp_path):
    stages = {"attention": 0.5, "mlp": 0.2, "router": 0.01, "loss": 0.2, "optimizer": 0.05, "rest": 0.04}
    row = {
        "size": "smollm2-135m T=512",
        "layers": 30,
        "tokens": 512,
        "stages": {"kvcat": stages, "plain": stages},
        "core_attention": {"kvcat": 0.3, "plain": 0.1},
        "ratios": {"step kvcat/plain": 2.1},
    }
    path = tmp_path / "step.json"
    path.write_text(json.dumps({"rows": [row]}))
    text = roofline_page.measured(path)
    lines = {
        cells[1].strip(): cells for cells in (line.split("|") for line in text.splitlines()) if len(cells) > 2
    }
    assert lines["core of attention"][5].strip() == "30.0%" and lines["projections"][5].strip() == "20.0%"
    mlp = 12 * 512 * 30 * 3 * 576 * 1536 / 1e9
    assert lines["mlp"][2].strip() == f"{mlp:,.1f}" and lines["mlp"][6].strip() == f"{mlp / 0.2:,.0f}"
    assert sum(float(lines[stage][3].strip(" %")) for stage in roofline_page.STAGES) == pytest.approx(
        100, abs=0.3
    )
    assert "×2.10 measured" in text
    assert "make bench" in roofline_page.measured(tmp_path / "none.json")


def test_the_stages_are_those_of_the_step_benchmark():
    from benchmarks import step

    assert {*step.STAGES, "core of attention", "projections"} - {"attention"} == set(roofline_page.STAGES)
