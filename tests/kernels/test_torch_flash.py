"""kernels/fused/torch_flash.py on PyTorch's own operators, with CPU kernels in place of the CUDA ones (torch_standin)."""

import pytest
import torch

from kvcat_nemo.kernels import causal_attention, select_backend
from kvcat_nemo.kernels.fused import selection, torch_flash
from kvcat_nemo.kernels.fused.torch_flash import TorchKernel
from tests.kernels import kernel_checks, torch_schemas, torch_standin

INSTALLED = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture
def gpu(monkeypatch):
    """PyTorch as built for CUDA, on the given compute capability; the kernel takes the CPU's tensors."""

    def put(capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    put()
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(TorchKernel, "device_type", "cpu")
    monkeypatch.setattr(TorchKernel, "dtypes", (torch.bfloat16, torch.float64))
    with torch_standin.installed():
        yield put
    selection.kernel.cache_clear()


FITS = {"device": "cpu", "dtype": torch.bfloat16, "head_dim_qk": 72, "head_dim_v": 72}


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("shape", kernel_checks.SHAPES)
def test_forward_and_backward(gpu, shape, window, packed):
    kernel_checks.check(TorchKernel(), kernel_checks.SHAPES[shape], window=window, packed=packed)
    assert [(c["pass"], c["packed"]) for c in torch_standin.calls] == [
        (name, packed) for name in ("forward", "backward", "backward")
    ]
    assert torch_standin.calls[0]["left"] == (-1 if window is None else window - 1)


@pytest.mark.parametrize("window", [None, 4])
def test_split_windows(gpu, window):
    """Calls without causality have more keys than queries."""
    kernel_checks.check_split(TorchKernel(), kernel_checks.SHAPES["GQA"], window=window)
    TorchKernel().check(**FITS, causal=False)


def test_strided_inputs_and_bf16(gpu):
    kernel_checks.check(TorchKernel(), kernel_checks.SHAPES["GQA"], strided=True)
    kernel_checks.check(TorchKernel(), kernel_checks.SHAPES["GQA"], dtype=torch.bfloat16, bound=2e-2)


@pytest.mark.parametrize("state", torch_standin.RANDOM_STATES)
def test_the_random_state_goes_back_as_it_came(gpu, monkeypatch, state):
    monkeypatch.setattr(torch_standin, "random_state", torch_standin.RANDOM_STATES[state])
    for packed in (False, True):
        kernel_checks.check(TorchKernel(), kernel_checks.SHAPES["heads"], packed=packed)


@pytest.mark.parametrize("settings", [{}, {"recent_window": 4}, {"sinks": 2}], ids=str)
@pytest.mark.parametrize("shape", kernel_checks.GATED)
def test_gated_attention_against_the_oracle(gpu, shape, settings):
    kernel_checks.check_gated("torch", kernel_checks.GATED[shape], **settings)
    if "sinks" not in settings:
        kernel_checks.check_gated(
            "torch", kernel_checks.GATED[shape], dtype=torch.bfloat16, bound=1.5e-2, **settings
        )
    widths = {call["width"] for call in torch_standin.calls if call["pass"] == "forward"}
    assert widths >= ({136} if "128" in shape else {72})


@pytest.mark.parametrize("case", [{"dominant": 60.0}, {"dominant": 500.0}, {"empty": True}], ids=str)
def test_gated_attention_with_dominant_dropped_slots_and_empty_rows(gpu, case):
    shape = kernel_checks.GATED["GQA, gate per KV head"]
    kernel_checks.check_gated("torch", shape, case=case, bound=1e-10)


def test_plain_attention_is_not_padded(gpu):
    q, k, v, do = kernel_checks.case((2, 9, 4, 2, 64, 64))
    out = causal_attention(q, k, v, scale=0.37, backend="torch")
    expected = kernel_checks.reference(q, k, v, do, scale=0.37)[0]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert [call["width"] for call in torch_standin.calls] == [64]


@pytest.mark.parametrize(
    ("mode", "variable", "expected"),
    [("off", "1", False), ("on", "1", True), ("warn", "1", True), ("off", "0", True)],
)
def test_determinism_reaches_the_operator(gpu, monkeypatch, mode, variable, expected):
    """PyTorch's operator asks for PyTorch's setting, without warn_only; afterwards the setting is what it was."""
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", variable)
    torch.use_deterministic_algorithms(mode != "off", warn_only=mode == "warn")
    try:
        kernel_checks.check(TorchKernel(), kernel_checks.SHAPES["heads"])
        assert torch.are_deterministic_algorithms_enabled() == (mode != "off")
        assert torch.is_deterministic_algorithms_warn_only_enabled() == (mode == "warn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert [c["deterministic"] for c in torch_standin.calls[1:]] == [expected] * 2


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_the_stand_in_returns_what_pytorchs_shape_functions_say(gpu, packed):
    """The real operators' own shape functions (meta kernels), on the call that the kernel makes."""
    q, k, v, _ = kernel_checks.case((1 if packed else 2, 12, 4, 2, 16, 16), torch.bfloat16)
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32) if packed else None
    call = (*((bounds, bounds, 7, 7) if packed else (None, None, 12, 12)), 0.0, True, False)
    if packed:
        q, k, v = q[0], k[0], v[0]
    settings = {"scale": 0.25, "window_size_left": -1, "window_size_right": 0}
    forward = torch.ops.aten._flash_attention_forward
    found = forward(q, k, v, *call, **settings)
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in (q, k, v, *call)]
    for name, one, other in zip(
        ["o", "lse", "first", "second", "debug"], found, forward(*meta, **settings), strict=True
    ):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name


def test_schemas_of_every_version_fit():
    for version, schemas in torch_schemas.SCHEMAS.items():
        for name, text in zip(torch_flash.TAKES, schemas, strict=True):
            assert torch_flash.unfit(name, torch._C.parse_schema(text)) == "", version
    assert min(torch_schemas.SCHEMAS) == torch_flash.OLDEST


def test_the_installed_schema_is_that_of_the_table():
    assert INSTALLED in torch_schemas.SCHEMAS, f"add torch {torch.__version__} to torch_schemas.py"
    for name, text in zip(torch_flash.TAKES, torch_schemas.SCHEMAS[INSTALLED], strict=True):
        assert str(getattr(torch.ops.aten, name).default._schema) == str(torch._C.parse_schema(text))


FORWARD, BACKWARD = torch_schemas.SCHEMAS[2, 13]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (FORWARD.replace("SymInt? window_size_left=None, ", ""), "does not take window_size_left"),
        (
            FORWARD.replace("float dropout_p, bool is_causal", "bool is_causal, float dropout_p"),
            "takes query, key",
        ),
        (FORWARD.replace("Tensor? block_table=None", "Tensor block_table"), "wants block_table"),
        (FORWARD.replace("Tensor unused, ", ""), "returns 4 values"),
        (BACKWARD.replace("Tensor out, Tensor logsumexp", "Tensor logsumexp, Tensor out"), "takes grad_out"),
        (BACKWARD.replace("Tensor unused, ", "Tensor unused, int more, "), "wants more"),
    ],
)
def test_another_interface_is_named(gpu, monkeypatch, text, why):
    schema = torch._C.parse_schema(text)
    name = schema.name.removeprefix("aten::")
    assert why in torch_flash.unfit(name, schema)
    monkeypatch.setattr(getattr(torch.ops.aten, name).default, "_schema", schema)
    with pytest.raises(ValueError, match=f"another interface .*{why}.*use te or flash"):
        TorchKernel().check(**FITS)


def test_an_older_random_state_fits():
    """Its two parts go by place, not by name."""
    old = BACKWARD.replace("rng_state", "philox_seed").replace("unused", "philox_offset")
    assert torch_flash.unfit("_flash_attention_backward", torch._C.parse_schema(old)) == ""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "meta"}, "tensors are on meta; it needs CUDA, use auto"),
        ({"dtype": torch.float16}, "use bf16"),
        ({"dtype": torch.float32}, "use bf16"),
        ({"head_dim_qk": 66}, "multiples of 8"),
        ({"head_dim_v": 264}, "up to 256"),
        ({"window": 0}, "window=0"),
    ],
)
def test_check_refuses(gpu, wrong, message):
    TorchKernel().check(**FITS)
    TorchKernel().check(**FITS, window=3, packed=True)
    with pytest.raises(ValueError, match=message):
        TorchKernel().check(**FITS | wrong)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_architectures(gpu, capability):
    gpu(capability)
    for width in (72, 136, 192, 256):
        TorchKernel().check(**FITS | {"head_dim_qk": width, "head_dim_v": width})
    wide = FITS | {"head_dim_qk": 200, "head_dim_v": 200}
    if capability in torch_flash.NO_WIDE_BACKWARD:
        with pytest.raises(ValueError, match=r"\(200, 200\) have no backward on compute capability"):
            TorchKernel().check(**wide)
    else:
        TorchKernel().check(**wide)


def test_old_devices_and_builds_are_refused(gpu, monkeypatch):
    gpu((7, 5))
    with pytest.raises(ValueError, match=r"compute capability \(7, 5\) is below 8.0"):
        TorchKernel().check(**FITS)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(ValueError, match="built without FlashAttention; use te or flash"):
        TorchKernel().check(**FITS)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="built for ROCm"):
        TorchKernel().check(**FITS)
    monkeypatch.setattr(torch, "__version__", "2.8.1+cu128")
    with pytest.raises(ValueError, match="2.8.1.* is older than 2.9"):
        TorchKernel().check(**FITS)


def test_widths(gpu):
    kernel = TorchKernel()
    assert kernel.widths(65, 66) == (72, 72) and kernel.widths(129, 130) == (136, 136)
    with pytest.raises(ValueError, match="exceed 256"):
        kernel.widths(257, 8)


def test_the_true_kernel_wants_cuda():
    with pytest.raises(ValueError, match="attention_backend=torch: tensors are on cpu"):
        select_backend("torch", device="cpu", dtype=torch.bfloat16, head_dim=64)
