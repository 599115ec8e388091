"""Which kernel a model's attention runs on, and what of the environment and of Megatron's own setting fits it."""

import os
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.small_models import MODELS, VOCAB, build, enliven, transformer_config

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def clean(monkeypatch):
    """The environment as it is before Megatron has built a model."""
    from kvcat_nemo.engine.config_checks import NVTE_VARIABLES

    for name in NVTE_VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def torch_backend(monkeypatch):
    """attention_backend=torch on the CPU, as on a GPU without Transformer Engine and flash-attn."""
    from kvcat_nemo.kernels.fused import selection
    from kvcat_nemo.kernels.fused.torch_flash import TorchKernel
    from tests.kernels import torch_standin

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(TorchKernel, "dtypes", (torch.bfloat16, torch.float64))
    monkeypatch.setattr(TorchKernel, "device_type", "cpu")
    monkeypatch.setitem(selection.AUTOMATIC, "cpu", ("te", "flash", "torch"))
    with torch_standin.installed():
        yield torch_standin.calls


def step(model, tokens, boundaries):
    positions = torch.arange(tokens.shape[1] - 1).expand(len(tokens), -1)
    if boundaries is not None:
        positions = torch.cat([torch.arange(n) for n in (7, 5, 12)])[None]
    metrics = model(tokens[:, :-1], positions, boundaries, labels=tokens[:, 1:])
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(metrics[:2].sum(), parameters.values(), allow_unused=True)
    return metrics.detach(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["windows", "packed"])
@pytest.mark.parametrize("name", ["router, tied, q/k norms", "router, untied, qkv bias", "none, untied"])
def test_a_model_on_pytorchs_kernel_is_the_same_model(torch_backend, name, packed):
    """`auto` where nothing but PyTorch is installed: local layers, attention_backend=torch, metrics and every gradient."""
    from kvcat_nemo.engine.core_attention import GatedCoreAttention

    rng = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, VOCAB, (1 if packed else 2, 25), generator=rng)
    boundaries = torch.tensor([0, 7, 12, 24], dtype=torch.int32) if packed else None
    found = {}
    for backend in ("auto", "cpu"):
        config = transformer_config(name, {"attention_backend": backend})
        model = build(config, MODELS[name][2], max_tokens=24)
        enliven(model)
        found[backend] = step(model, tokens, boundaries)
        used = {m.backend for m in model.modules() if isinstance(m, GatedCoreAttention)}
        assert used == {"torch" if backend == "auto" else "cpu"}
    passes = {call["pass"] for call in torch_backend if call["packed"] is packed}
    assert passes == {"forward", "backward"}
    (metrics, grads), (expected, others) = found["auto"], found["cpu"]
    torch.testing.assert_close(metrics, expected, rtol=1e-10, atol=1e-12)
    for key, grad in grads.items():
        if grad is None:
            assert others[key] is None, key
            continue
        assert float((grad - others[key]).abs().max()) <= 1e-9 * max(1e-3, float(others[key].abs().max())), (
            key
        )


def test_both_halves_run_on_one_kernel(torch_backend, monkeypatch):
    """A backend that takes the dense half's width and not the gates' columns serves neither."""
    from kvcat_nemo.engine.core_attention import GatedCoreAttention
    from kvcat_nemo.kernels.fused import selection
    from kvcat_nemo.kernels.fused.cpu import CpuKernel

    def check(self, *, head_dim_qk, **rest):
        if head_dim_qk > 4:
            raise ValueError("attention_backend=cpu: no columns")

    monkeypatch.setattr(CpuKernel, "check", check)
    monkeypatch.setitem(selection.AUTOMATIC, "cpu", ("cpu", "torch"))
    model = build(transformer_config("router, untied, qkv bias"), False, max_tokens=24)
    enliven(model)
    step(model, torch.randint(0, VOCAB, (1, 25), generator=torch.Generator().manual_seed(4)), None)
    assert {m.backend for m in model.modules() if isinstance(m, GatedCoreAttention)} == {"torch"}


# torch.use_deterministic_algorithms' own list, as far as it is of operators that a model may call; of floats where noted.
NO_DETERMINISTIC_FORM = [
    "cumsum",
    "cumsum_",
    "nll_loss_forward",
    "nll_loss2d_forward",
    "ctc_loss",
    "put",
    "put_",
    "histc",
    "median",
    "kthvalue",
    "grid_sampler_2d",
    "scatter_reduce",
    "_embedding_bag",
    "reflection_pad1d_backward",
    "max_unpool2d",
]


class _AsCuda(TorchDispatchMode):
    """Raises where CUDA would with trainer.deterministic=True."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        floats = any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args)
        weighted = name == "bincount" and (len(args) > 1 or "weights" in (kwargs or {}))
        if torch.are_deterministic_algorithms_enabled() and (
            weighted or (name in NO_DETERMINISTIC_FORM and floats)
        ):
            raise RuntimeError(f"{name} does not have a deterministic implementation")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("packed", [False, True], ids=["windows", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_no_operator_of_a_step_is_without_a_deterministic_form_on_cuda(deterministic, name, packed):
    """trainer.deterministic=True: CUDA has none for cumsum of floats, which linear attention's running states were."""
    rng = torch.Generator().manual_seed(4)
    # Longer than a chunk of linear attention, so that states run on.
    tokens = torch.randint(0, VOCAB, (1 if packed else 2, 25 if packed else 301), generator=rng)
    boundaries = torch.tensor([0, 7, 12, 24], dtype=torch.int32) if packed else None
    model = build(transformer_config(name), MODELS[name][2], max_tokens=300)
    enliven(model)
    with _AsCuda():
        metrics, grads = step(model, tokens, boundaries)
    assert torch.isfinite(metrics).all()
    torch.use_deterministic_algorithms(False)
    expected, others = step(model, tokens, boundaries)
    torch.testing.assert_close(metrics, expected, rtol=1e-10, atol=1e-12)
    for key, grad in grads.items():
        if grad is not None:
            assert float((grad - others[key]).abs().max()) <= 1e-9 * max(1e-3, float(others[key].abs().max()))


def test_the_mode_sees_cumsum(deterministic):
    with _AsCuda():
        torch.ones(3, dtype=torch.int64).cumsum(0)
        with pytest.raises(RuntimeError, match="cumsum does not have a deterministic"):
            torch.ones(3).cumsum(0)


def test_megatron_sets_what_the_table_says(clean):
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    from kvcat_nemo.engine.config_checks import NVTE_VARIABLES, SET_BY_MEGATRON

    assert set(SET_BY_MEGATRON) == {member.name for member in AttnBackend}
    for backend in AttnBackend:
        for name in NVTE_VARIABLES:
            clean.delenv(name, raising=False)
        LanguageModule._set_attention_backend(
            types.SimpleNamespace(config=types.SimpleNamespace(attention_backend=backend))
        )
        assert "".join(os.environ[name] for name in NVTE_VARIABLES) == SET_BY_MEGATRON[backend.name]


@pytest.mark.parametrize(
    ("backend", "variables", "proposed"),
    [
        ("auto", {}, None),
        ("auto", {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "1"}, None),
        ("flash", {"NVTE_FUSED_ATTN": "0"}, None),
        ("auto", {"NVTE_FLASH_ATTN": "0"}, "fused"),
        ("auto", {"NVTE_FUSED_ATTN": "0"}, "flash"),
        ("auto", {"NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": "0"}, "flash"),
        ("flash", {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1"}, "fused"),
        ("fused", {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "1"}, "auto"),
        ("auto", {"NVTE_UNFUSED_ATTN": "0"}, ""),
    ],
)
def test_an_environment_that_megatron_asserts_on(clean, backend, variables, proposed):
    """Refused where Megatron would stop, before any model is built, with the setting that says the same."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.transformer.enums import AttnBackend

    from kvcat_nemo.engine.config_checks import validate_model_config

    for name, value in variables.items():
        clean.setenv(name, value)
    config = transformer_config(attention_backend=AttnBackend[backend])
    before = dict(os.environ)
    if proposed is None:
        validate_model_config(config)
        assert dict(os.environ) == before, "a check leaves no trace"
    else:
        with pytest.raises(ValueError, match=f"{[*variables][0]}=.*unset them") as caught:
            validate_model_config(config)
        advice = f"unset them and set model.config.attention_backend={proposed}" if proposed else "unset them"
        assert str(caught.value).endswith(advice)
    self = types.SimpleNamespace(config=config)
    try:
        LanguageModule._set_attention_backend(self)
    except AssertionError:
        assert proposed is not None
    else:
        assert proposed is None
    if proposed:
        for name in variables:
            clean.delenv(name, raising=False)
        config.attention_backend = AttnBackend[proposed]
        validate_model_config(config)


def test_the_check_sees_the_environment_that_megatron_will_set(clean):
    from megatron.core.transformer.enums import AttnBackend

    from kvcat_nemo.engine import config_checks as module

    seen = []
    clean.setattr(module, "select_backend", lambda *args, **known: seen.append(os.environ["NVTE_FUSED_ATTN"]))
    module.validate_model_config(transformer_config(attention_backend=AttnBackend.flash))
    assert seen == ["0"] and "NVTE_FUSED_ATTN" not in os.environ
