"""Transformer Engine without a GPU: its Python layer is the real one, its compiled extension is this file.

`install()` puts a module in place of transformer_engine_torch whose fused_attn_fwd and fused_attn_bwd take the very
arguments Transformer Engine's wrappers pass and compute what the cuDNN kernel promises, in float64 on the CPU. They
read memory as the kernel does: strides are ignored, documents come from cu_seqlens, formats from the layout enum,
softmax statistics and random state from the auxiliary tensors. `get_fused_attn_backend` answers by cuDNN's rules for
bf16 and fp16 as Transformer Engine's C++ layer states them, for the machine named by `Machine`. What of this differs
between versions comes from te_versions.py, for the version that is installed.

Real here: signatures, enums, get_attention_backend, its environment variables and its flash-attn detection. Not real:
the compiled kernel and its rounding. Runs in the environment .venv-te (make setup).
"""

from __future__ import annotations

import contextlib
import enum
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
import warnings
from unittest import mock

import torch

from tests.kernels import softmax_standin, te_versions

FACTS = te_versions.FACTS[tuple(map(int, importlib.metadata.version("transformer-engine").split(".")[:2]))]
"""Of the installed version."""

# Values as in transformer_engine's headers; only those the tests reach must agree with them.
ENUMS = {
    "DType": "kByte=0 kInt32=2 kFloat32=4 kFloat16=5 kBFloat16=6 kFloat8E4M3=7 kFloat8E5M2=8 kFloat4E2M1=10",
    "FP8FwdTensors": " ".join(
        f"GEMM{i}_{t}={3 * i - 3 + j}" for i in (1, 2, 3) for j, t in enumerate(("INPUT", "WEIGHT", "OUTPUT"))
    ),
    "FP8BwdTensors": " ".join(
        f"GRAD_{t}{i}={2 * i - 2 + j}" for i in (1, 2, 3) for j, t in enumerate(("OUTPUT", "INPUT"))
    ),
    "CommOverlapType": "RS=0 AG=1",
    "CommOverlapAlgo": "BULK_OVERLAP_AG=0 BULK_OVERLAP_RS=1 SPLIT_PIPELINED_AG_P2P=2 SPLIT_PIPELINED_RS=3 "
    "SPLIT_PIPELINED_RS_P2P=4 ATOMIC_GEMM_RS=5 ATOMIC_GEMM_AG_P2P=6 ATOMIC_GEMM_RS_P2P=7 EXTERNAL_BULK_OVERLAP_AG=8",
    "Float8BlockScaleTensorFormat": "GEMM_READY=0 COMPACT=1 INVALID=2",
    "NVTEQBHistogramMode": "TWO_KERNEL=0 FUSED_ATOMIC=1",
    "NVTERoutingMapFormat": "BYTEMAP=0 BITMAP_U8=1",
    "NVTEScalingMode": "NVTE_DELAYED_TENSOR_SCALING=0 NVTE_MXFP8_1D_SCALING=1 NVTE_BLOCK_SCALING_1D=2 "
    "NVTE_BLOCK_SCALING_2D=3 NVTE_NVFP4_1D_SCALING=4 NVTE_INVALID_SCALING=100",
    "NVTE_Bias_Type": "NVTE_NO_BIAS=0 NVTE_PRE_SCALE_BIAS=1 NVTE_POST_SCALE_BIAS=2 NVTE_ALIBI=3",
    "NVTE_Fused_Attn_Backend": "NVTE_F16_arbitrary_seqlen=1 NVTE_FP8=2 NVTE_No_Backend=-1",
    "NVTE_Mask_Type": "NVTE_NO_MASK=0 NVTE_PADDING_MASK=1 NVTE_CAUSAL_MASK=2 NVTE_PADDING_CAUSAL_MASK=3 "
    "NVTE_CAUSAL_BOTTOM_RIGHT_MASK=4 NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK=5",
    "NVTE_QKV_Format": "NVTE_SBHD=0 NVTE_BSHD=1 NVTE_THD=2 NVTE_BSHD_2SBHD=3 NVTE_SBHD_2BSHD=4 NVTE_THD_2BSHD=5 "
    "NVTE_THD_2SBHD=6 NVTE_BHSD=7 NVTE_QKV_Format_NOT_SET=8",
    "NVTE_QKV_Layout": " ".join(
        f"NVTE_{name}={value}"
        for value, name in enumerate(
            [
                "SB3HD",
                "SBH3D",
                "SBHD_SB2HD",
                "SBHD_SBH2D",
                "SBHD_SBHD_SBHD",
                "BS3HD",
                "BSH3D",
                "BSHD_BS2HD",
                "BSHD_BSH2D",
                "BSHD_BSHD_BSHD",
                "T3HD",
                "TH3D",
                "THD_T2HD",
                "THD_TH2D",
                "THD_THD_THD",
                "SBHD_BSHD_BSHD",
                "BSHD_SBHD_SBHD",
                "THD_BSHD_BSHD",
                "THD_SBHD_SBHD",
                "Paged_KV_BSHD_BSHD_BSHD",
                "Paged_KV_BSHD_SBHD_SBHD",
                "Paged_KV_SBHD_BSHD_BSHD",
                "Paged_KV_SBHD_SBHD_SBHD",
                "Paged_KV_THD_BSHD_BSHD",
                "Paged_KV_THD_SBHD_SBHD",
                "BHSD_BHSD_BHSD",
                "QKV_Layout_NOT_SET",
            ]
        )
    ),
    "NVTE_Softmax_Type": "NVTE_VANILLA_SOFTMAX=0 NVTE_OFF_BY_ONE_SOFTMAX=1 NVTE_LEARNABLE_SOFTMAX=2",
}

machine = types.SimpleNamespace(capability=(9, 0), cudnn=0)
"""The faked device; `Machine` changes it."""

launches: list[dict] = []
"""Every kernel launch since `launches.clear()`: direction, layout, head dims, window, mask."""


class _Extension(types.ModuleType):
    """Whatever nobody named (GEMMs, norms, communication) is a mock: importable, of no use."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = mock.MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _NoTriton(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Transformer Engine imports triton at its top, for kernels that attention has no part in."""

    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = _Extension(spec.name)
        module.__version__ = "3.0.0"
        return module

    def exec_module(self, module):
        pass


def _segments(q, k, layout, max_seqlen, cu_seqlens, cu_padded, max_kv, cu_kv):
    """The token ranges the kernel would walk: [(index for q/k/v/o, batch row)]."""
    layouts = sys.modules["transformer_engine_torch"].NVTE_QKV_Layout
    if layout == layouts.NVTE_THD_THD_THD:
        assert cu_padded is not None and cu_padded.dtype == torch.int32, (
            "thd: padded offsets are dereferenced"
        )
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        assert max(lengths) <= max_seqlen
        return [
            (slice(at, at + n), row)
            for row, (at, n) in enumerate(zip(cu_padded.tolist()[:-1], lengths, strict=True))
        ]
    assert layout == layouts.NVTE_BSHD_BSHD_BSHD, layout
    for x, longest, bounds in ((q, max_seqlen, cu_seqlens), (k, max_kv, cu_kv)):
        assert x.shape[1] == longest and bounds.tolist() == [i * longest for i in range(x.shape[0] + 1)]
    return [((row, slice(None)), row) for row in range(q.shape[0])]


def _common(layout, mask, bias, softmax, window, bottom_right, q, k, v, cu_q, cu_kv, dropout, dtype):
    tex = sys.modules["transformer_engine_torch"]
    thd = layout == tex.NVTE_QKV_Layout.NVTE_THD_THD_THD
    causal = tex.NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK if thd else tex.NVTE_Mask_Type.NVTE_CAUSAL_MASK
    plain = mask == tex.NVTE_Mask_Type.NVTE_NO_MASK and not thd
    assert mask == causal or plain
    assert bias == tex.NVTE_Bias_Type.NVTE_NO_BIAS
    assert softmax == tex.NVTE_Softmax_Type.NVTE_VANILLA_SOFTMAX and dropout == 0.0 and not bottom_right
    left, right = window
    assert window == (-1, -1) if plain else (right == 0 and left >= -1), window
    assert cu_q.dtype == cu_kv.dtype == torch.int32 and (plain or torch.equal(cu_q, cu_kv))
    assert q.dtype == k.dtype == v.dtype == dtype
    return left, thd, not plain


def _by_position(function, names: str):
    """The function as the extension has it: arguments by position; those that a version has not stay at their defaults."""
    names = names.split()

    def call(*args):
        assert len(args) == len(names), (len(args), names)
        return function(**dict(zip(names, args, strict=True)))

    return call


def _statistics_shape(thd: bool, tokens: int, heads: int, documents: int, longest: int) -> tuple[int, ...]:
    """Of the softmax statistics, as the C++ layer allocates them."""
    if not thd or machine.cudnn < 90600:
        return documents, heads, longest, 1
    rows = FACTS.rows
    if machine.capability == (12, 0):
        assert FACTS.sm120_rows is not None, "packed documents on sm120"
        rows = FACTS.sm120_rows
    if rows == "dense":
        return documents, heads, longest, 1
    return (te_versions.rounded(tokens) if rows == "rounded" else tokens), heads, 1


def _fused_attn_fwd(
    *, max_seqlen_q, max_seqlen_kv, is_training, attn_scale, dropout, set_zero, qkv_layout, bias_type, mask_type,
    softmax_type, window, cu_q, cu_kv, q, k, v, fake_dtype, cu_q_padded, cu_kv_padded, page_table_k, page_table_v,
    s_quantizer, o_quantizer, bias, softmax_offset, rng_gen, rng_elts_per_thread, return_max_logit, o_format=None,
    scale_inv_format=None, bottom_right=False, cuda_graph=False,
):  # fmt: skip
    left, thd, causal = _common(
        qkv_layout,
        mask_type,
        bias_type,
        softmax_type,
        window,
        bottom_right,
        q,
        k,
        v,
        cu_q,
        cu_kv,
        dropout,
        fake_dtype,
    )
    tex = sys.modules["transformer_engine_torch"]
    assert o_format in (None, tex.NVTE_QKV_Format.NVTE_THD if thd else tex.NVTE_QKV_Format.NVTE_BSHD)
    assert (
        is_training and not return_max_logit and s_quantizer is o_quantizer is bias is softmax_offset is None
    )
    q, k, v = map(softmax_standin.dense_view, (q, k, v))
    o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    wide = torch.promote_types(q.dtype, torch.float32)
    H = q.shape[-2]
    shape = _statistics_shape(thd, q.shape[0], H, cu_q.numel() - 1, max_seqlen_q)
    stats = torch.full(shape, float("nan"), dtype=wide)
    ragged = stats.dim() == 3
    for at, row in _segments(q, k, qkv_layout, max_seqlen_q, cu_q, cu_q_padded, max_seqlen_kv, cu_kv):
        out, lse = softmax_standin.forward(q[at], k[at], v[at], attn_scale, left, causal)
        o[at] = out.to(o.dtype)
        if ragged:
            stats[at, :, 0] = lse.T.to(wide)
        else:
            stats[row, :, : lse.shape[-1], 0] = lse.to(wide)
    launches.append(
        {"pass": "forward", "thd": thd, "dims": (q.shape[-1], v.shape[-1]), "left": left, "scale": attn_scale}
    )
    return [o, stats, torch.tensor([1234, 0])]


def _fused_attn_bwd(
    *, max_seqlen_q, max_seqlen_kv, attn_scale, dropout, set_zero, qkv_layout, bias_type, mask_type, softmax_type, window,
    deterministic, cu_q, cu_kv, q, k, v, o, do, fake_dtype, aux, cu_q_padded, cu_kv_padded, s_quantizer, dp_quantizer,
    dqkv_quantizer, dqkv_dtype=None, o_format=None, do_format=None, dqkv_layout=None, scale_inv_format=None,
    do_scale_inv_format=None, bottom_right=False, cuda_graph=False,
):  # fmt: skip
    left, thd, causal = _common(
        qkv_layout,
        mask_type,
        bias_type,
        softmax_type,
        window,
        bottom_right,
        q,
        k,
        v,
        cu_q,
        cu_kv,
        dropout,
        fake_dtype,
    )
    tex = sys.modules["transformer_engine_torch"]
    expected = tex.NVTE_QKV_Format.NVTE_THD if thd else tex.NVTE_QKV_Format.NVTE_BSHD
    if FACTS.calls == "2.16":
        assert o_format == do_format == expected and dqkv_layout == qkv_layout
    else:  # gradients' dtype: bf16, which the tests' float64 passes for
        assert dqkv_dtype == tex.DType.kBFloat16, dqkv_dtype
    assert o.dtype == do.dtype == fake_dtype and o.shape == do.shape
    stats, rng_state = aux
    assert stats.shape == _statistics_shape(thd, q.shape[0], q.shape[-2], cu_q.numel() - 1, max_seqlen_q)
    assert rng_state.tolist() == [1234, 0], "auxiliary tensors: statistics first, then the random state"
    q, k, v, o, do, stats = map(softmax_standin.dense_view, (q, k, v, o, do, stats))
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for at, row in _segments(q, k, qkv_layout, max_seqlen_q, cu_q, cu_q_padded, max_seqlen_kv, cu_kv):
        length = q[at].shape[0]
        lse = stats[at, :, 0].T if stats.dim() == 3 else stats[row, :, :length, 0]
        for grad, value in zip(
            grads,
            softmax_standin.backward(do[at], q[at], k[at], v[at], o[at], lse, attn_scale, left, causal),
            strict=True,
        ):
            grad[at] = value.to(grad.dtype)
    launches.append(
        {"pass": "backward", "thd": thd, "dims": (q.shape[-1], v.shape[-1]), "deterministic": deterministic}
    )
    return [*grads, None, None]


def _get_fused_attn_backend(*args):
    """cuDNN's rules for training in bf16 and fp16, as transformer_engine's fused_attn.cpp states them."""
    if FACTS.asked is None:
        (params,) = args
    else:
        names = FACTS.asked.split()
        params = types.SimpleNamespace(**{"deterministic": False} | dict(zip(names, args, strict=True)))
    tex = sys.modules["transformer_engine_torch"]
    sm = machine.capability[0] * 10 + machine.capability[1]
    qk, v = params.head_dim_qk, params.head_dim_v
    thd = params.qkv_layout == tex.NVTE_QKV_Layout.NVTE_THD_THD_THD
    half = {int(tex.DType.kFloat16), int(tex.DType.kBFloat16)}
    assert params.is_training and params.dropout == 0.0
    dims = qk % 8 == v % 8 == 0 and (
        (qk <= 128 and v <= 128)
        or (qk <= 256 and v <= 256 and sm == 90)
        or ((qk, v) == (192, 128) and sm >= 100)
        or (
            (qk, v) == (256, 256)
            and FACTS.wide_sm100
            and 100 <= sm < 110
            and machine.cudnn >= (92500 if thd else 92300)
        )
    )
    # Hopper's backward is wrong for unequal wide head dims.
    dims = dims and not (sm == 90 and qk >= 128 and v >= 128 and qk != v and (qk, v) != (192, 128))
    mask = tex.NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK if thd else tex.NVTE_Mask_Type.NVTE_CAUSAL_MASK
    plain = params.attn_mask_type == tex.NVTE_Mask_Type.NVTE_NO_MASK and not thd
    deterministic = params.deterministic and FACTS.judges_determinism
    fits = (
        int(params.qkv_dtype) in half
        and dims
        and (not thd or (sm >= 90 and machine.cudnn >= 90600))
        and (params.attn_mask_type == mask or plain)
        and params.window_size_right == (-1 if plain else 0)
        and params.max_seqlen_q <= params.max_seqlen_kv
        and not (deterministic and sm >= 100 and (machine.cudnn < 91801 or sm == 120))
        and not (sm == 120 and machine.cudnn < FACTS.sm120)
    )
    backends = tex.NVTE_Fused_Attn_Backend
    backend = backends.NVTE_F16_arbitrary_seqlen if fits else backends.NVTE_No_Backend
    if FACTS.short_kernel and max(params.max_seqlen_q, params.max_seqlen_kv) <= 512:
        lengths = params.max_seqlen_q % 64 == params.max_seqlen_kv % 64 == 0
        heads = params.num_attn_heads == params.num_gqa_groups
        short = (
            sm in (80, 90)
            and lengths
            and heads
            and qk == v == 64
            and params.window_size_left == -1
            and not thd
        )
        asked = int(os.environ.get("NVTE_FUSED_ATTN_BACKEND", int(backend)))
        if short and (not fits or asked == int(backends.NVTE_F16_max512_seqlen)):
            backend = backends.NVTE_F16_max512_seqlen
    return (backend, "" if fits else "stand-in: no rule") if FACTS.asked is None else backend


def install():
    """Import the real transformer_engine.pytorch on top of the stand-in; returns the extension module."""
    import torch._dynamo  # noqa: F401  before triton seems to be there
    import torch._inductor.runtime.hints
    import torch._inductor.utils  # noqa: F401

    tex = _Extension("transformer_engine_torch")
    tex.__file__ = __file__
    for name, members in ENUMS.items():
        values = {n: int(v) for n, v in (pair.split("=") for pair in members.split())}
        if name == "NVTE_Fused_Attn_Backend" and FACTS.short_kernel:
            values["NVTE_F16_max512_seqlen"] = 0
        setattr(tex, name, enum.IntEnum(name, values))
    tex.fused_attn_fwd = _by_position(_fused_attn_fwd, te_versions.FORWARD[FACTS.calls])
    tex.fused_attn_bwd = _by_position(_fused_attn_bwd, te_versions.BACKWARD[FACTS.calls])
    tex.get_fused_attn_backend = _get_fused_attn_backend
    tex.get_cudnn_version = lambda: machine.cudnn
    sys.modules[tex.__name__] = tex
    sys.meta_path.append(_NoTriton())
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # do not look for shared libraries
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's first try to load its shared library
        import transformer_engine.common as common

    common.load_framework_extension = lambda *args, **kwargs: None
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        import transformer_engine.pytorch  # noqa: F401
    return tex


@contextlib.contextmanager
def Machine(capability: tuple[int, int], cudnn: int | None = None, **environment: str):
    """A GPU of that compute capability, as far as Transformer Engine's selection can tell."""
    from transformer_engine.pytorch import utils

    properties = types.SimpleNamespace(major=capability[0], minor=capability[1])
    before = dict(vars(machine))
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: capability),
        mock.patch.dict(os.environ, environment),
    ):
        machine.capability, machine.cudnn = capability, cudnn or FACTS.cudnn
        for name in ("_get_device_compute_capability", "_get_cudnn_version", "get_cudnn_version"):
            getattr(getattr(utils, name, None), "cache_clear", lambda: None)()
        try:
            yield
        finally:
            vars(machine).update(before)
