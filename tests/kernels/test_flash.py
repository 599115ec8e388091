"""kernels/flash.py against flash-attn's signatures (flash_standin): both generations, packing, windows, refusals."""

import sys

import flash_standin
import kernel_checks
import pytest
import torch

from kvcat_nemo.kernels import backends, flash


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
    for name in [n for n in sys.modules if n.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
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
    backends.kernel.cache_clear()
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
    backends.kernel.cache_clear()
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
    with pytest.raises(ValueError, match="not installed"):
        flash.functions(2)
    assert not flash.available(3)
    packages(2, version_2="2.6.3")
    with pytest.raises(ValueError, match="another interface"):
        flash.functions(2)
    packages(2, capability=(7, 5))
    with pytest.raises(ValueError, match="below 8.0"):
        OnCpu().check(**FITS)
