"""kernels/fused/flash.py against flash-attn's signatures (flash_standin): both generations, packing, windows, refusals."""

import sys
import types

import pytest
import torch

from kvcat_nemo.kernels.compat import flash_packages
from kvcat_nemo.kernels.fused import flash, selection
from tests.kernels import flash_standin, kernel_checks


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-in packages on sys.path and a faked device; returns a function that sets both."""

    def put(*generations, capability=(9, 0), **settings):
        flash_standin.write(tmp_path, generations, **settings)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        flash_standin.calls.clear()

    flash.functions.cache_clear()
    yield put
    flash.functions.cache_clear()
    for name in [
        n for n in sys.modules if n.split(".")[0] in ("flash_attn", "flash_attn_3", "flash_attn_interface")
    ]:
        del sys.modules[name]


class OnCpu(flash.FlashKernel):
    """The kernel with the stand-in's device and dtypes."""

    device_type = "cpu"
    dtypes = (torch.bfloat16, torch.float64)


FITS = {"device": "cpu", "dtype": torch.bfloat16, "head_dim_qk": 72, "head_dim_v": 72}


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("shape", kernel_checks.SHAPES)
def test_flash_attention_2(packages, shape, window, packed):
    packages(2)
    kernel_checks.check(OnCpu(), kernel_checks.SHAPES[shape], window=window, packed=packed)
    name = "flash2 packed" if packed else "flash2"
    assert flash_standin.calls == [f"{name} forward", f"{name} backward", f"{name} backward"]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("generation", [2, 3])
def test_split_windows(packages, generation, window):
    packages(2, 3, capability=(9, 0) if generation == 3 else (8, 0))
    kernel_checks.check_split(OnCpu(), kernel_checks.SHAPES["GQA"], window=window)
    assert {call.split()[0] for call in flash_standin.calls} == {f"flash{generation}"}


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_flash_attention_3_on_hopper_alone(packages, packed):
    packages(2, 3)
    kernel_checks.check(OnCpu(), kernel_checks.SHAPES["GQA"], window=3, packed=packed)
    assert {call.split()[0] for call in flash_standin.calls} == {"flash3"}
    packages(2, 3, capability=(8, 0))
    kernel_checks.check(OnCpu(), kernel_checks.SHAPES["GQA"], packed=packed)
    assert {call.split()[0] for call in flash_standin.calls} == {"flash2"}


@pytest.mark.parametrize(
    ("asked", "expected"), [("nothing", False), ("PyTorch", True), ("the variable", True)]
)
@pytest.mark.parametrize("generation", [2, 3])
def test_determinism_reaches_the_functions(packages, monkeypatch, generation, asked, expected):
    packages(2, 3, capability=(9, 0) if generation == 3 else (8, 0))
    module, given = flash.functions(generation), []
    backward = module._flash_attn_backward
    monkeypatch.setattr(
        module, "_flash_attn_backward", lambda *x, **y: given.append(y["deterministic"]) or backward(*x, **y)
    )
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0" if asked == "the variable" else "1")
    torch.use_deterministic_algorithms(asked == "PyTorch")
    try:
        kernel_checks.check(OnCpu(), kernel_checks.SHAPES["heads"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert given == [expected] * 2


def test_strided_inputs_and_bf16(packages):
    packages(2)
    kernel_checks.check(OnCpu(), kernel_checks.SHAPES["GQA"], strided=True)
    kernel_checks.check(OnCpu(), kernel_checks.SHAPES["GQA"], dtype=torch.bfloat16, bound=2e-2)


@pytest.mark.parametrize("settings", [{}, {"recent_window": 4}], ids=str)
@pytest.mark.parametrize("shape", kernel_checks.GATED)
def test_gated_attention_against_the_oracle(packages, monkeypatch, shape, settings):
    packages(2, capability=(8, 0))
    for name in ("device_type", "dtypes"):
        monkeypatch.setattr(flash.FlashKernel, name, getattr(OnCpu, name))
    selection.kernel.cache_clear()
    kernel_checks.check_gated("flash", kernel_checks.GATED[shape], **settings)
    kernel_checks.check_gated(
        "flash", kernel_checks.GATED[shape], dtype=torch.bfloat16, bound=1.5e-2, **settings
    )
    assert len(flash_standin.calls) == (8 if settings else 4)


@pytest.mark.parametrize("shape", kernel_checks.GATED)
def test_gates_behind_a_cut_against_the_oracle(packages, monkeypatch, shape):
    packages(2, capability=(8, 0))
    for name in ("device_type", "dtypes"):
        monkeypatch.setattr(flash.FlashKernel, name, getattr(OnCpu, name))
    selection.kernel.cache_clear()
    kernel_checks.check_spans("flash", kernel_checks.GATED[shape], sinks=1)
    kernel_checks.check_spans("flash", kernel_checks.GATED[shape], dtype=torch.bfloat16, bound=1.5e-2)
    assert {call.split()[0] for call in flash_standin.calls} == {"flash2"}


def test_check_accepts_what_fits(packages):
    packages(2, capability=(8, 0))
    OnCpu().check(**FITS)
    OnCpu().check(**FITS, window=3, packed=True)


def test_widths(packages):
    packages(2)
    assert OnCpu().widths(65, 66) == (72, 72)
    assert OnCpu().widths(64, 66) == (72, 72)
    assert OnCpu().widths(129, 130) == (136, 136)
    with pytest.raises(ValueError, match="exceed 256"):
        OnCpu().widths(257, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "meta"}, "needs CUDA, use auto"),
        ({"dtype": torch.float16}, "use bf16"),
        ({"dtype": torch.float32}, "use bf16"),
        ({"head_dim_qk": 66}, "multiples of 8"),
        ({"head_dim_v": 264}, "up to 256"),
        ({"window": 0}, "window=0"),
    ],
)
def test_check_refuses(packages, wrong, message):
    packages(2)
    with pytest.raises(ValueError, match=message):
        OnCpu().check(**FITS | wrong)


def test_the_true_kernel_wants_cuda(packages):
    packages(2)
    with pytest.raises(ValueError, match="tensors are on cpu"):
        flash.FlashKernel().check(**FITS)


def test_old_devices_and_packages_are_refused(packages):
    with pytest.raises(ValueError, match="flash-attn is not installed.*attention_backend=torch"):
        flash.functions(2)
    assert not flash.available(3)
    packages(2, version_2="2.6.3")
    with pytest.raises(ValueError, match=r"another interface \(it is version 2.6\); install 2.7 or 2.8"):
        flash.functions(2)
    packages(2, capability=(7, 5))
    with pytest.raises(ValueError, match="below 8.0"):
        OnCpu().check(**FITS)


@pytest.mark.parametrize("module", ["flash_attn_interface.py", "flash_attn_3/flash_attn_interface.py"])
@pytest.mark.parametrize("beta", flash_standin.FLASH_3_BETAS)
def test_a_beta_of_flash_attention_3_is_told_by_its_signatures(packages, beta, module):
    """Betas call themselves 3.0.0.b1, which is no older than 3.0 to a version check: FlashAttention-2 serves."""
    packages(2, 3, flash_3=flash_standin.FLASH_3_BETAS[beta], version_3="3.0.0.b1", module_3=module)
    with pytest.raises(ValueError, match="flash-attn-3 has another interface.*install 3.0.0"):
        flash.functions(3)
    kernel_checks.check(OnCpu(), kernel_checks.SHAPES["GQA"], window=3)
    assert {call.split()[0] for call in flash_standin.calls} == {"flash2"}


def test_a_beta_without_flash_attention_2(packages):
    packages(3, flash_3=[*flash_standin.FLASH_3_BETAS.values()][0], version_3="3.0.0.b1")
    with pytest.raises(
        ValueError, match="flash-attn is not installed.*not its betas.*attention_backend=torch"
    ):
        OnCpu().check(**FITS)


def test_the_final_release_where_transformer_engine_has_it_copied_to(packages):
    packages(2, 3, module_3="flash_attn_3/flash_attn_interface.py")
    kernel_checks.check(OnCpu(), kernel_checks.SHAPES["GQA"])
    assert {call.split()[0] for call in flash_standin.calls} == {"flash3"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def _flash_attn_forward(q, k, v, **kwargs): pass", "has no _flash_attn_backward"),
        ("_flash_attn_forward = _flash_attn_backward = lambda **anything: None", ""),
        ("_flash_attn_forward = lambda q, k, v: None", "does not take causal, cu_seqlens_k"),
    ],
)
def test_what_is_wrong_is_named(text, why):
    module = types.ModuleType("flash_attn_interface")
    exec(text, vars(module))  # noqa: S102  a signature as it could be
    found = flash_packages._unfit(module, 3)
    assert why in found and bool(found) is bool(why)
