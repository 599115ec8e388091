"""flash-attn without a GPU: packages on disk with the real functions' names, signatures and schemas, computed densely.

`write(folder)` makes flash_attn 2.8.3 and flash_attn_3 3.0.0 there, as importable packages with their metadata, so that
version checks (ours and Transformer Engine's) run for real. The functions are custom operators, as the originals are:
torch checks every argument's name and type against the schema. Those the CUDA kernel ignores strides of (lse, gradients)
are read as plain memory.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.kernels import softmax_standin

calls: list[str] = []
"""Which function ran, since `calls.clear()`."""

FLASH_2 = '''
"""Stand-in for flash_attn.flash_attn_interface of flash-attn 2.8.3."""
from typing import Optional, Tuple

from tests.kernels import flash_standin
import torch
from torch import Tensor

op = torch.library.custom_op


@op("flash_attn::_flash_attn_forward", mutates_args=(), device_types="cpu")
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Optional[Tensor], return_softmax: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    flash_standin.plain_2(causal, dropout_p, softcap, alibi_slopes, window_size_left, window_size_right)
    o, lse = flash_standin.run_forward("flash2", q, k, v, None, softmax_scale, window_size_left, causal)
    return o, lse, q.new_empty(0), torch.tensor([7, 0])


@op("flash_attn::_flash_attn_varlen_forward", mutates_args=(), device_types="cpu")
def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Optional[Tensor] = None, return_softmax: bool = False,
    block_table: Optional[Tensor] = None, leftpad_k: Optional[Tensor] = None, seqused_k: Optional[Tensor] = None,
    zero_tensors: bool = False,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    assert causal
    flash_standin.plain_2(causal, dropout_p, softcap, alibi_slopes, window_size_left, window_size_right)
    flash_standin.packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    o, lse = flash_standin.run_forward("flash2 packed", q, k, v, cu_seqlens_q, softmax_scale, window_size_left)
    return o, lse, q.new_empty(0), torch.tensor([7, 0])


@op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Optional[Tensor],
    dk: Optional[Tensor], dv: Optional[Tensor], dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Optional[Tensor], deterministic: bool,
    rng_state: Optional[Tensor] = None,
) -> Tensor:
    flash_standin.plain_2(causal, dropout_p, softcap, alibi_slopes, window_size_left, window_size_right)
    assert rng_state is not None and rng_state.tolist() == [7, 0]
    return flash_standin.run_backward(
        "flash2", dout, q, k, v, out, softmax_lse, dq, dk, dv, None, softmax_scale, window_size_left, causal
    )


@op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Optional[Tensor],
    dk: Optional[Tensor], dv: Optional[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Optional[Tensor], deterministic: bool,
    rng_state: Optional[Tensor] = None, zero_tensors: bool = False,
) -> Tensor:
    assert causal
    flash_standin.plain_2(causal, dropout_p, softcap, alibi_slopes, window_size_left, window_size_right)
    flash_standin.packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert rng_state is not None and rng_state.tolist() == [7, 0]
    return flash_standin.run_backward(
        "flash2 packed", dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, softmax_scale, window_size_left
    )


def flash_attn_func():
    raise NotImplementedError


flash_attn_varlen_func = flash_attn_func
'''

FLASH_3 = '''
"""Stand-in for flash_attn_interface of flash-attn-3 3.0.0."""
from typing import Optional, Tuple

from tests.kernels import flash_standin
import torch
from torch import Tensor

op = torch.library.custom_op


@op("flash_attn_3::_flash_attn_forward", mutates_args=(), device_types="cpu")
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Optional[Tensor] = None, v_new: Optional[Tensor] = None,
    qv: Optional[Tensor] = None, out_: Optional[Tensor] = None, cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None, cu_seqlens_k_new: Optional[Tensor] = None,
    seqused_q: Optional[Tensor] = None, seqused_k: Optional[Tensor] = None, max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None, page_table: Optional[Tensor] = None, kv_batch_idx: Optional[Tensor] = None,
    leftpad_k: Optional[Tensor] = None, rotary_cos: Optional[Tensor] = None, rotary_sin: Optional[Tensor] = None,
    seqlens_rotary: Optional[Tensor] = None, q_descale: Optional[Tensor] = None, k_descale: Optional[Tensor] = None,
    v_descale: Optional[Tensor] = None, softmax_scale: Optional[float] = None, causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0,
    rotary_interleaved: bool = True, scheduler_metadata: Optional[Tensor] = None, num_splits: int = 1,
    pack_gqa: Optional[bool] = None, sm_margin: int = 0,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    flash_standin.plain_2(causal, 0.0, softcap, None, window_size_left, window_size_right)
    if cu_seqlens_q is not None:
        assert causal
        flash_standin.packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    name = "flash3" if cu_seqlens_q is None else "flash3 packed"
    o, lse = flash_standin.run_forward(name, q, k, v, cu_seqlens_q, softmax_scale, window_size_left, causal)
    return o, lse, q.new_empty(0), q.new_empty(0)


@op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Optional[Tensor] = None, cu_seqlens_k: Optional[Tensor] = None, sequed_q: Optional[Tensor] = None,
    sequed_k: Optional[Tensor] = None, max_seqlen_q: Optional[int] = None, max_seqlen_k: Optional[int] = None,
    dq: Optional[Tensor] = None, dk: Optional[Tensor] = None, dv: Optional[Tensor] = None,
    softmax_scale: Optional[float] = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:
    flash_standin.plain_2(is_causal, 0.0, softcap, None, window_size_left, window_size_right)
    if cu_seqlens_q is not None:
        assert is_causal
        flash_standin.packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    name = "flash3" if cu_seqlens_q is None else "flash3 packed"
    return flash_standin.run_backward(
        name, dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, softmax_scale, window_size_left, is_causal
    )


def flash_attn_func():
    raise NotImplementedError


flash_attn_varlen_func = flash_attn_with_kvcache = flash_attn_func
'''


FLASH_3_BETAS = {  # both call themselves 3.0.0.b1; signatures alone, from the repository's history of hopper/
    "a pair for the window, until July 2025": """
def _flash_attn_forward(
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):
    raise AssertionError("called")


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk,
    dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):
    raise AssertionError("called")


def flash_attn_func():
    raise NotImplementedError


flash_attn_varlen_func = flash_attn_with_kvcache = flash_attn_func
""",
    "no defaults, from July 2025 on": FLASH_3.replace(
        "sequed_q: Optional[Tensor] = None", "sequed_q: Optional[Tensor]"
    ).replace(
        "cu_seqlens_q: Optional[Tensor] = None, cu_seqlens_k: Optional[Tensor] = None, sequed",
        "cu_seqlens_q: Optional[Tensor], cu_seqlens_k: Optional[Tensor], sequed",
    ),
}


def write(
    folder: Path,
    generations: tuple[int, ...] = (2,),
    version_2: str = "2.8.3",
    flash_3: str = FLASH_3,
    version_3: str = "3.0.0",
    module_3: str = "flash_attn_interface.py",
) -> None:
    """Put the packages into a folder that the caller puts on sys.path.

    Args:
        flash_3: the module of generation 3 (FLASH_3, or one of FLASH_3_BETAS); module_3: where it lies.
    """
    files = {}
    if 2 in generations:
        files |= {
            "flash_attn/__init__.py": f'__version__ = "{version_2}"\n',
            "flash_attn/flash_attn_interface.py": FLASH_2,
            "flash_attn_2_cuda.py": "def varlen_bwd():\n    raise NotImplementedError\n",
            f"flash_attn-{version_2}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version_2}\n",
        }
    if 3 in generations:
        files |= {
            "flash_attn_3/__init__.py": "",
            module_3: flash_3,
            f"flash_attn_3-{version_3}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flash-attn-3\nVersion: {version_3}\n",
        }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def plain_2(causal, dropout_p, softcap, alibi_slopes, left, right) -> None:
    assert dropout_p == 0.0 and softcap == 0.0 and alibi_slopes is None
    assert right == 0 if causal else (left, right) == (-1, -1)


def packed(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> None:
    assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    assert max_q == max_k == int((cu_q[1:] - cu_q[:-1]).max())


def _rows(name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None):
    """Where each sequence lies; checks what the C++ layer checks."""
    assert q.dtype == k.dtype == v.dtype and q.shape[-1] % 8 == v.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    if name.startswith("flash2"):
        assert k.shape == v.shape and q.shape[-1] == v.shape[-1], "flash-attn 2 knows one width"
    elif q.shape[-1] != v.shape[-1]:
        assert 128 < q.shape[-1] <= 192 and 96 < v.shape[-1] <= 128
    assert q.dim() == (4 if cu_seqlens is None else 3)
    return list(range(q.shape[0])) if cu_seqlens is None else softmax_standin.documents(cu_seqlens)


def run_forward(name, q, k, v, cu_seqlens, scale, left, causal=True) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    H = q.shape[-2]
    lse = torch.empty((H, len(q)) if cu_seqlens is not None else (len(q), H, q.shape[1]), dtype=wide)
    for at in _rows(name, q, k, v, cu_seqlens):
        out, rows = softmax_standin.forward(q[at], k[at], v[at], scale, left, causal)
        o[at] = out.to(o.dtype)
        lse[(slice(None), at) if cu_seqlens is not None else at] = rows.to(wide)
    calls.append(f"{name} forward")
    return o, lse


def run_backward(name, do, q, k, v, o, lse, dq, dk, dv, cu_seqlens, scale, left, causal=True) -> Tensor:
    assert lse.is_contiguous() and all(x.is_contiguous() for x in (dq, dk, dv))
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape) and o.shape == do.shape
    assert o.dtype == do.dtype == q.dtype and all(x.stride(-1) == 1 for x in (do, o))
    for at in _rows(name, q, k, v, cu_seqlens):
        rows = lse[:, at] if cu_seqlens is not None else lse[at]
        grads = softmax_standin.backward(do[at], q[at], k[at], v[at], o[at], rows, scale, left, causal)
        for target, value in zip((dq, dk, dv), grads, strict=True):
            target[at] = value.to(target.dtype)
    calls.append(f"{name} backward")
    return q.new_empty(0)
