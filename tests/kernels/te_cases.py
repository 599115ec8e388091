"""kernels/fused/te.py on the real Transformer Engine with a stand-in extension. Runs under .venv-te; test_te.py starts it."""

import dataclasses
import inspect
import sys

import pytest
import torch

from tests.kernels import flash_standin, kernel_checks, te_standin


@pytest.fixture(scope="session", autouse=True)
def engine(tmp_path_factory):
    """flash-attn 2 and 3 on disk, then the real Transformer Engine: it finds both by itself."""
    folder = tmp_path_factory.mktemp("flash")
    flash_standin.write(folder, (2, 3), version_2=FACTS.flash, module_3=FACTS.flash_3)
    sys.path.insert(0, str(folder))
    tex = te_standin.install()
    from transformer_engine.pytorch.attention.dot_product_attention.utils import FlashAttentionUtils

    assert FlashAttentionUtils.is_installed and FlashAttentionUtils.v3_is_installed
    return tex


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The stand-in's device and dtypes; Transformer Engine is told that float64 is bf16."""
    from transformer_engine.pytorch import constants

    from kvcat_nemo.kernels.fused import selection
    from kvcat_nemo.kernels.fused.flash import FlashKernel
    from kvcat_nemo.kernels.fused.te import TransformerEngineKernel
    from kvcat_nemo.kernels.fused.te_selection import Selection

    if FACTS.calls != "2.16":  # there backward is told the gradients' dtype
        monkeypatch.setitem(constants.TE_DType, torch.float64, constants.TE_DType[torch.bfloat16])
    asked = Selection.choose
    monkeypatch.setattr(
        Selection,
        "choose",
        lambda self, *dims, **known: asked(self, *dims, **known | {"dtype": torch.bfloat16}),
    )
    for kernel in (FlashKernel, TransformerEngineKernel):
        monkeypatch.setattr(kernel, "device_type", "cpu")
        monkeypatch.setattr(kernel, "dtypes", (torch.bfloat16, torch.float64))
    selection.kernel.cache_clear()
    te_standin.launches.clear()
    flash_standin.calls.clear()


def on_cpu():
    from kvcat_nemo.kernels.fused.te import TransformerEngineKernel

    return TransformerEngineKernel()


ARCHITECTURES = {"sm80": (8, 0), "sm90": (9, 0), "sm100": (10, 0), "sm120": (12, 0)}
FACTS = te_standin.FACTS
NO_FLASH = {"NVTE_FLASH_ATTN": "0"}
NO_CUDNN = {"NVTE_FUSED_ATTN": "0"}


def test_every_argument_has_its_name_in_the_installed_version():
    from transformer_engine.pytorch.attention.dot_product_attention.utils import AttentionParams
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    from kvcat_nemo.kernels.fused import te, te_selection

    choice = te_selection.Choice("cudnn", 1)
    shared, later, _ = te._arguments(torch.zeros(1, 4, 1, 8), 4, choice, 1.0, None, None, None, True)
    forward = inspect.signature(fused_attn.fused_attn_fwd).parameters
    backward = inspect.signature(fused_attn.fused_attn_bwd).parameters
    both = set(forward) & set(backward)
    assert set(shared) <= both and {"aux_ctx_tensors", "d_o", "deterministic"} <= set(backward)
    unknown = {"2.9": {"o_format", "bottom_right_diagonal"}, "2.12": {"o_format"}, "2.16": set()}
    assert set(later) - both == unknown[FACTS.calls]
    formats = {"do_format", "dqkv_layout"} <= set(backward)
    assert formats is (FACTS.calls == "2.16") is ("dqkv_dtype" not in backward)
    asked = {}
    with te_standin.Machine((9, 0)), pytest.MonkeyPatch.context() as patch:
        call = te_selection.call
        patch.setattr(
            te_selection, "call", lambda f, required, known: asked.update(known) or call(f, {}, known)
        )
        te_selection.Selection().choose(72, 72)
    defaults = {x.name: x.default for x in dataclasses.fields(AttentionParams)}
    newer = {"bottom_right_diagonal"} if FACTS.calls == "2.9" else set()
    if FACTS.asked is not None:
        newer |= {"num_tokens_q", "num_tokens_kv", "softmax_scale"}
    assert set(asked) - set(defaults) == newer
    assert defaults["core_attention_bias_shape"] == FACTS.bias_shape
    # Whatever the rest of the defaults are, they are those of plain attention: nothing else was forgotten.
    rest = {name: value for name, value in defaults.items() if name not in asked}
    assert rest["core_attention_bias_type"] == "no_bias" and rest["attention_dropout"] == 0.0
    assert not any(rest[name] for name in ("pad_between_seqs", "context_parallel", "fp8"))
    assert rest["softmax_type"] == "vanilla" and rest["alibi_slopes_shape"] is None


@pytest.mark.parametrize(
    ("machine", "environment", "dims", "widths", "backend"),
    [
        ("sm80", {}, (65, 66), (72, 72), "flash2"),
        ("sm80", NO_FLASH, (65, 66), (72, 72), "cudnn"),
        ("sm80", {}, (129, 130), (136, 136), "flash2"),
        ("sm90", {}, (65, 66), (72, 72), "cudnn"),
        ("sm90", {}, (64, 66), (64, 72), "cudnn"),
        ("sm90", NO_CUDNN, (65, 66), (72, 72), "flash3"),
        ("sm90", {}, (129, 130), (136, 136), "cudnn"),
        ("sm90", {}, (128, 130), (136, 136), "cudnn"),
        ("sm100", {}, (65, 66), (72, 72), "cudnn"),
        ("sm100", {}, (129, 128), (192, 128), "cudnn"),
        # Before 2.18 cuDNN has no (256, 256) there: FlashAttention-2 serves, as it does where cuDNN is forbidden.
        ("sm100", {}, (129, 130), *(((256, 256), "cudnn") if FACTS.wide_sm100 else ((136, 136), "flash2"))),
        ("sm100", NO_CUDNN, (129, 130), (136, 136), "flash2"),
        ("sm120", {}, (65, 66), (72, 72), "cudnn"),
    ],
)
def test_widths_and_backend_by_architecture(machine, environment, dims, widths, backend):
    kernel = on_cpu()
    with te_standin.Machine(ARCHITECTURES[machine], **environment):
        assert kernel.widths(*dims) == widths
        assert kernel.selection.choose(*widths).name == backend
        kernel.check(head_dim_qk=widths[0], head_dim_v=widths[1], dtype=torch.bfloat16, device="cpu")


def shape_for(machine, name):
    """A shape of kernel_checks that Transformer Engine takes on that machine."""
    *sizes, D, E = kernel_checks.SHAPES[name]
    if machine in ("sm100", "sm120") and D > 128:
        D, E = 128, 128
    if machine == "sm80" and not FACTS.pads_values:
        E = D
    return *sizes, D, E


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("shape", ["GQA", "unequal widths", "wide", "one token"])
def test_forward_and_backward(shape, machine, window, packed):
    kernel = on_cpu()
    shape = shape_for(machine, shape)
    environment = {} if machine == "sm80" else NO_FLASH
    if machine == "sm120" and packed and FACTS.sm120_rows is None:
        with (
            te_standin.Machine((12, 0), **environment),
            pytest.raises(ValueError, match="packed documents on"),
        ):
            kernel_checks.check(kernel, shape, window=window, packed=True)
        return
    with te_standin.Machine(ARCHITECTURES[machine], **environment):
        kernel_checks.check(kernel, shape, window=window, packed=packed)
        assert kernel.last.name == ("flash2" if machine == "sm80" else "cudnn")
    if machine != "sm80":
        passes = [launch["pass"] for launch in te_standin.launches]
        assert passes == ["forward", "backward", "backward"]
        first = te_standin.launches[0]
        assert first["thd"] is packed and first["dims"] == shape[4:]
        assert first["left"] == (-1 if window is None else window - 1) and first["scale"] == 0.37


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("shape", ["GQA", "unequal widths"])
def test_split_windows(shape, machine, window):
    kernel = on_cpu()
    with te_standin.Machine(ARCHITECTURES[machine], **({} if machine == "sm80" else NO_FLASH)):
        kernel_checks.check_split(kernel, shape_for(machine, shape), window=window)
        assert kernel.last.name == ("flash2" if machine == "sm80" else "cudnn")
        kernel.check(head_dim_qk=72, head_dim_v=72, dtype=torch.bfloat16, device="cpu", causal=False)


@pytest.mark.parametrize("settings", [{}, {"recent_window": 4}, {"sinks": 2}], ids=str)
@pytest.mark.parametrize("shape", kernel_checks.GATED)
@pytest.mark.parametrize("machine", ["sm80", "sm90", "sm100"])
def test_gated_attention_against_the_oracle(machine, shape, settings):
    flash = machine == "sm80" or (machine == "sm100" and "128" in shape and not FACTS.wide_sm100)
    ran = set()
    with te_standin.Machine(ARCHITECTURES[machine]), pytest.MonkeyPatch.context() as patch:
        from kvcat_nemo.kernels.fused.te import TransformerEngineKernel

        true = TransformerEngineKernel.forward

        def forward(self, *args, **kwargs):
            out = true(self, *args, **kwargs)
            ran.add(self.last.name)
            return out

        patch.setattr(TransformerEngineKernel, "forward", forward)
        kernel_checks.check_gated("te", kernel_checks.GATED[shape], **settings)
    # A window's slots are a call of their own, without columns: cuDNN takes its widths everywhere.
    assert ran == (
        {"flash2"} | ({"cudnn"} if machine == "sm100" and "recent_window" in settings else set())
        if flash
        else {"cudnn"}
    )


@pytest.mark.parametrize("shape", kernel_checks.GATED)
@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_gates_behind_a_cut_against_the_oracle(machine, shape):
    with te_standin.Machine(ARCHITECTURES[machine]):
        kernel_checks.check_spans("te", kernel_checks.GATED[shape], sinks=1)
        kernel_checks.check_spans("te", kernel_checks.GATED[shape], case={"dominant": 500.0}, bound=1e-10)


@pytest.mark.parametrize("case", [{"dominant": 60.0}, {"dominant": 500.0}, {"empty": True}], ids=str)
def test_gated_attention_with_dominant_dropped_slots_and_empty_rows(case):
    with te_standin.Machine((9, 0)):
        shape = kernel_checks.GATED["GQA, gate per KV head"]
        kernel_checks.check_gated("te", shape, case=case, bound=1e-10)


def test_gated_attention_in_bf16():
    with te_standin.Machine((9, 0)):
        for shape in kernel_checks.GATED.values():
            kernel_checks.check_gated("te", shape, dtype=torch.bfloat16, bound=1.5e-2)
            kernel_checks.check_spans("te", shape, dtype=torch.bfloat16, bound=1.5e-2)
    widths = {launch["dims"] for launch in te_standin.launches}
    assert widths == {
        (72, 72),
        (136, 136),
        (64, 64),
        (128, 128),
    }  # the last two: a span's plain call on itself


def test_plain_attention_is_not_padded():
    from kvcat_nemo.kernels import causal_attention

    with te_standin.Machine((9, 0)):
        q, k, v, do = kernel_checks.case((2, 9, 4, 2, 64, 64))
        out = causal_attention(q, k, v, scale=0.37, backend="te")
    torch.testing.assert_close(
        out, kernel_checks.reference(q, k, v, do, scale=0.37)[0], rtol=1e-12, atol=1e-12
    )
    assert [launch["dims"] for launch in te_standin.launches] == [(64, 64)]


def test_ampere_without_flash_attn_runs_on_cudnn():
    kernel = on_cpu()
    with te_standin.Machine((8, 0), **NO_FLASH):
        kernel_checks.check(kernel, kernel_checks.SHAPES["GQA"], window=3)
    assert kernel.last.name == "cudnn"


def test_hopper_on_flash_attention_3():
    kernel = on_cpu()
    with te_standin.Machine((9, 0), **NO_CUDNN):
        kernel_checks.check(kernel, kernel_checks.SHAPES["GQA"], packed=True)
    assert set(flash_standin.calls) == {"flash3 packed forward", "flash3 packed backward"}


def test_strided_inputs_and_bf16():
    kernel = on_cpu()
    with te_standin.Machine((9, 0)):
        kernel_checks.check(kernel, kernel_checks.SHAPES["GQA"], strided=True)
        kernel_checks.check(kernel, kernel_checks.SHAPES["GQA"], dtype=torch.bfloat16, bound=2e-2)


def test_determinism_reaches_the_kernel():
    with te_standin.Machine((9, 0), NVTE_ALLOW_NONDETERMINISTIC_ALGO="0"):
        kernel_checks.check(on_cpu(), kernel_checks.SHAPES["heads"])
    assert [launch["deterministic"] for launch in te_standin.launches[1:]] == [True, True]
    te_standin.launches.clear()
    with te_standin.Machine((9, 0)):
        kernel_checks.check(on_cpu(), kernel_checks.SHAPES["heads"])
    assert [launch["deterministic"] for launch in te_standin.launches[1:]] == [False, False]


@pytest.mark.parametrize(
    ("machine", "environment", "dims", "packed", "message"),
    [
        ("sm80", NO_FLASH, (136, 136), False, "8.0 .* selects unfused.*install flash-attn"),
        ("sm80", NO_FLASH, (72, 72), True, "packed documents on compute capability 8.0"),
        ("sm90", NO_FLASH | NO_CUDNN, (72, 72), False, "model.config.attention_backend .*flash or fused"),
        (
            "sm90",
            NO_FLASH | NO_CUDNN | {"NVTE_UNFUSED_ATTN": "0"},
            (72, 72),
            False,
            "selects none",
        ),
    ],
)
def test_what_no_kernel_takes_is_refused(machine, environment, dims, packed, message):
    fits = {"dtype": torch.bfloat16, "device": "cpu", "packed": packed}
    with (
        te_standin.Machine(ARCHITECTURES[machine], **environment),
        pytest.raises(ValueError, match=message),
    ):
        on_cpu().check(head_dim_qk=dims[0], head_dim_v=dims[1], **fits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "meta"}, "needs CUDA, use auto"),
        ({"dtype": torch.float16}, "FP8 attention is not supported"),
        ({"dtype": torch.float8_e4m3fn}, "FP8 attention is not supported"),
        ({"window": 0}, "window=0"),
    ],
)
def test_check_refuses(wrong, message):
    fits = {"dtype": torch.bfloat16, "device": "cpu", "head_dim_qk": 72, "head_dim_v": 72}
    with te_standin.Machine((9, 0)):
        on_cpu().check(**fits)
        on_cpu().check(**fits, window=4, packed=True)
        with pytest.raises(ValueError, match=message):
            on_cpu().check(**fits | wrong)


def test_too_wide_heads_are_refused():
    with te_standin.Machine((9, 0)), pytest.raises(ValueError, match=r"\(257, 8\)"):
        on_cpu().widths(257, 8)


@pytest.mark.parametrize("tokens", [512, 1024, 1025, 3072])
def test_statistics_of_packed_documents(tokens):
    """Up to 2.10 they have more rows than there are tokens: at 1,024 none, at 512 and 3,072 as many again."""
    bounds = [*range(0, tokens, max(64, tokens // 64)), tokens]
    shape = (1, tokens, 1, 1, 8, 8)
    with te_standin.Machine((9, 0)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_checks, "PACKED", bounds)
        kernel_checks.check(on_cpu(), shape, packed=True)
        assert te_standin.machine.cudnn >= 90600


def test_flash_attention_4_and_other_kernels_that_cannot_serve_are_refused():
    from kvcat_nemo.kernels.fused.te_selection import Choice, Selection

    with te_standin.Machine((10, 0)):
        with pytest.raises(ValueError, match="NVTE_FLASH_ATTN_V4=0, or model.config.attention_backend=fused"):
            Selection().require(Choice("flash4"), 72, 72, False)
        with pytest.raises(ValueError, match="NVTE_FUSED_ATTN_BACKEND=1"):
            Selection().require(Choice("cudnn512", 0), 64, 64, False)


def test_the_short_cudnn_kernel():
    """NVTE_FUSED_ATTN_BACKEND=0 asks for it, in versions that have it."""
    short = {"tokens": 512, "heads": 4, "groups": 4}
    kernel = on_cpu()
    with te_standin.Machine((9, 0), NVTE_FUSED_ATTN_BACKEND="0"):
        assert kernel.selection.choose(64, 64, **short).name == (
            "cudnn512" if FACTS.short_kernel else "cudnn"
        )
        assert kernel.selection.choose(64, 64, **short | {"tokens": 1024}).name == "cudnn"
    with te_standin.Machine((9, 0)):  # the choice is the environment's too, and is asked for anew
        assert kernel.selection.choose(64, 64, **short).name == "cudnn"


def test_packed_documents_on_sm120():
    """Up to 2.13 the selection refuses them; from 2.14 to 2.17 it does not, and their statistics do not fit."""
    why = {True: "selects cudnn-sm120.*install 2.18", False: "packed documents on compute capability 12.0"}
    fits = {"dtype": torch.bfloat16, "device": "cpu", "head_dim_qk": 72, "head_dim_v": 72, "packed": True}
    with te_standin.Machine((12, 0), **NO_FLASH):
        if FACTS.sm120_rows == "dense":
            return on_cpu().check(**fits)
        with pytest.raises(ValueError, match=why[FACTS.package in ("2.14.0", "2.16.0")]):
            on_cpu().check(**fits)
    with te_standin.Machine((12, 0), **NO_CUDNN):
        on_cpu().check(**fits)


def test_determinism_on_blackwell():
    """The compiled part rules from 2.12 on, before it the Python layer: cuDNN from 9.18.1 on, or none."""
    kernel = on_cpu()
    forbid = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    for cudnn, serves in ((91300, False), (91801, FACTS.judges_determinism)):
        with te_standin.Machine((10, 0), cudnn, **forbid):
            assert kernel.selection.choose(72, 72, scale=1 / cudnn).name == ("cudnn" if serves else "flash2")


@pytest.mark.parametrize("version", ["2.8.0", "2.21.0", "1.13.0", "3.0"])
def test_other_versions_are_refused_by_name(monkeypatch, version):
    from kvcat_nemo.kernels.compat import te_package

    te_package.engine.cache_clear()
    monkeypatch.setattr(te_package.importlib.metadata, "version", lambda name: version)
    short = ".".join(version.split(".")[:2])
    with pytest.raises(ValueError, match=f"Transformer Engine {short} is not supported; install 2.9 to 2.20"):
        te_package.engine()
    monkeypatch.undo()
    te_package.engine.cache_clear()


def test_this_version_is_supported():
    from kvcat_nemo.kernels.compat import te_package

    assert te_package.OLDEST <= te_package.version() <= te_package.NEWEST
    assert te_package.version() == tuple(map(int, FACTS.package.split(".")[:2]))


def test_hopper_with_a_beta_of_flash_attention_3(monkeypatch):
    """Transformer Engine goes by the package's version alone: FlashAttention-2 serves where the functions do not fit."""
    from kvcat_nemo.kernels.compat import flash_packages

    true = flash_packages.functions
    monkeypatch.setattr(
        flash_packages, "_unfit", lambda module, generation: "" if generation == 2 else "it is a beta"
    )
    true.cache_clear()
    with te_standin.Machine((9, 0), **NO_CUDNN):
        kernel = on_cpu()
        assert kernel.selection.choose(72, 72).name == "flash3"
        kernel_checks.check(kernel, kernel_checks.SHAPES["GQA"])
    assert set(flash_standin.calls) == {"flash2 forward", "flash2 backward"}
    true.cache_clear()


def test_selection_is_remembered_and_bounded(monkeypatch):
    from transformer_engine.pytorch.attention.dot_product_attention import utils

    from kvcat_nemo.kernels.fused import te_selection

    asked = []
    true = utils.get_attention_backend
    monkeypatch.setattr(utils, "get_attention_backend", lambda p: asked.append(p) or true(p))
    monkeypatch.setattr(te_selection, "MOST_REMEMBERED", 3)
    selection = te_selection.Selection()
    with te_standin.Machine((9, 0)):
        for tokens in (8, 8, 16, 16, 24, 32, 40, 48, 48):
            selection.choose(72, 72, tokens=tokens)
    assert len(asked) == 6 and len(selection._choices) <= 4
