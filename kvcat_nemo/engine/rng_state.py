"""All random state of a process as one tensor of bytes, to be saved with a checkpoint and put back."""

from __future__ import annotations

import hashlib
import io
import random

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from kvcat_nemo.engine import hardware

_HEADER = 8


def capture() -> Tensor:
    """State of Python's, numpy's, torch's (CPU and CUDA) generators and of Megatron's tracker, uint8 [n]."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "tracker": {
            k: v.clone() for k, v in get_cuda_rng_tracker().get_states().items() if isinstance(v, Tensor)
        },
    }
    if hardware.is_cuda():
        state["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def restore(packed: Tensor) -> None:
    """Put back what `capture` returned, on the same kind of host."""
    state = torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and hardware.is_cuda():
        torch.cuda.set_rng_state(state["cuda"])
    if state["tracker"]:
        get_cuda_rng_tracker().set_states(state["tracker"])


def digest(packed: Tensor) -> int:
    """A 53-bit number (exact in JSON and in a double) that differs when any state does."""
    state = torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)
    whole = hashlib.sha256()
    for part in (*state["python"][1:], *state["numpy"][1:], state["torch"], state.get("cuda")):
        whole.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    for name in sorted(state["tracker"]):
        whole.update(name.encode() + state["tracker"][name].numpy().tobytes())
    return int.from_bytes(whole.digest()[:8], "little") >> 11


def to_row(packed: Tensor, width: int) -> Tensor:
    """[1, width] uint8: the length, the bytes, zeros; one row of the checkpoint's tensor of all ranks."""
    assert len(packed) + _HEADER <= width, (len(packed), width)
    row = torch.zeros(1, width, dtype=torch.uint8)
    row[0, :_HEADER] = torch.frombuffer(bytearray(len(packed).to_bytes(_HEADER, "little")), dtype=torch.uint8)
    row[0, _HEADER : _HEADER + len(packed)] = packed
    return row


def from_row(row: Tensor) -> Tensor:
    """The inverse of `to_row`."""
    length = int.from_bytes(row[0, :_HEADER].numpy().tobytes(), "little")
    return row[0, _HEADER : _HEADER + length].clone()


def row_width(packed: Tensor) -> int:
    """Width of a row that has room for this state and for a somewhat longer one of another rank."""
    return -(-(len(packed) + _HEADER) // 4096) * 4096 + 4096
