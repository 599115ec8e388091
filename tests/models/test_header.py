"""Headers of safetensors files: what the library reads is read, every kind of damage is refused before a tensor is."""

import json
import struct

import pytest

from kvcat_nemo.models.weights import read_header


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def text(*entries):
    return "{" + ", ".join(f'"{name}": {json.dumps(value)}' for name, value in entries) + "}"


DAMAGE = {
    "too short": (text(("a", entry(0, 8))), 4),
    "too long": (text(("a", entry(0, 8))), 12),
    "a hole": (text(("a", entry(0, 8)), ("b", entry(16, 24))), 24),
    "overlapping": (text(("a", entry(0, 8)), ("b", entry(4, 12))), 12),
    "another size": (text(("a", entry(0, 8, (3,)))), 8),
    "before the data": (text(("a", entry(-8, 0))), 8),
    "an unknown dtype": (text(("a", entry(0, 8, (2,), "F33"))), 8),
    "a size that is no number": (text(("a", entry(0, 8, (True, 2)))), 8),
    "a fractional size": (text(("a", entry(0, 8, (2.0,)))), 8),
    "no offsets": (text(("a", {"dtype": "F32", "shape": [2]})), 8),
    "a name twice": (text(("a", entry(0, 8)), ("a", entry(8, 16))), 16),
    "sizes that overflow": (text(("a", entry(0, 8, (2**62, 4)))), 8),
    "metadata that is no text": ('{"__metadata__": {"x": 1}}', 0),
    "a list": ("[1]", 0),
    "no JSON": ("{", 0),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage(tmp_path, kind):
    header, size = DAMAGE[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(size))
    with pytest.raises(
        ValueError, match=r"model.safetensors is truncated, damaged, or not a safetensors file \(.+\); fetch"
    ):
        read_header(file)


@pytest.mark.parametrize(
    "data", [b"", b"abc", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10**9) + b"{}", b"\0" * 64]
)
def test_other_files(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_offsets_are_those_of_the_bytes(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.ones(5, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "a": ("BF16", (5,)),
        "b": ("F32", (2, 3)),
    }
    content = (tmp_path / "x.safetensors").read_bytes()
    for name, stored in found.items():
        own = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[stored.start : stored.start + stored.nbytes] == own
