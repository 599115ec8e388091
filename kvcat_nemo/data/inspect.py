"""What an indexed dataset on disk holds, read through Megatron-core's own reader."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from kvcat_nemo.data.dataset_manifest import read_manifest
from kvcat_nemo.data.tokenizer import load_tokenizer

_CHUNK = 1 << 24  # tokens looked at in one go


@dataclass(frozen=True)
class Inspection:
    """Findings; lengths in tokens, EOD included."""

    documents: int
    tokens: int
    dtype: str
    shortest: int
    median: int
    longest: int
    eod_token: str
    eod_id: int
    ended: int
    """Documents whose last token is EOD."""
    eod_inside: int
    """EOD tokens anywhere but at a document's end."""
    beginning: str
    """The first tokens of the first document, decoded."""


def _check_index(file: Path) -> None:
    """Raise ValueError for an index that isn't whole: Megatron's reader would only assert somewhere inside."""
    with open(file, "rb") as opened:
        head = opened.read(34)
    if len(head) == 34 and head[:9] == b"MMIDIDX\0\0":
        # After the magic: version u64, dtype u8, sequences u64, document bounds u64; then the three arrays.
        sequences, bounds = struct.unpack("<QQ", head[18:])
        if file.stat().st_size == 34 + 12 * sequences + 8 * bounds and sequences and bounds > 1:
            return
    raise ValueError(f"{file} is damaged, or holds no document")


def inspect_dataset(
    prefix: str | Path, tokenizer_dir: str | Path | None = None, show: int = 48
) -> Inspection:
    """Read PREFIX.bin/.idx and check where EOD stands.

    Args:
        prefix: path without the suffix.
        tokenizer_dir: Hugging Face folder; by default the one that the manifest beside PREFIX names.
        show: tokens of the first document to decode.

    Raises:
        ValueError: files missing or damaged, or no tokenizer known.
    """
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = Path(str(prefix).removesuffix(".bin").removesuffix(".idx"))
    if not IndexedDataset.exists(str(prefix)):
        raise ValueError(f"{prefix}.bin and {prefix}.idx are not both there")
    eod_token = None
    try:
        manifest = read_manifest(prefix.parent)
        eod_token = manifest.tokenizer["eod_token"]
        tokenizer_dir = tokenizer_dir or manifest.tokenizer["path"]
    except ValueError:
        if (prefix.parent / "manifest.json").exists() or tokenizer_dir is None:
            raise
    tokenizer = load_tokenizer(tokenizer_dir, eod_token)

    _check_index(Path(f"{prefix}.idx"))
    dataset = IndexedDataset(str(prefix))
    lengths = np.asarray(dataset.sequence_lengths, dtype=np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.memmap(f"{prefix}.bin", dtype=dataset.index.dtype, mode="r")
    if len(ids) != bounds[-1]:
        raise ValueError(f"{prefix}.bin holds {len(ids)} tokens, its index says {bounds[-1]}")
    ends = bounds[np.asarray(dataset.document_indices[1:])]
    starts = np.concatenate([[0], ends[:-1]])
    ended = int((ids[ends - 1] == tokenizer.eod_id).sum())
    eods = sum(int((ids[i : i + _CHUNK] == tokenizer.eod_id).sum()) for i in range(0, len(ids), _CHUNK))
    per_document = ends - starts
    return Inspection(
        documents=len(ends),
        tokens=len(ids),
        dtype=dataset.index.dtype.__name__,
        shortest=int(per_document.min()),
        median=int(np.median(per_document)),
        longest=int(per_document.max()),
        eod_token=tokenizer.eod_token,
        eod_id=tokenizer.eod_id,
        ended=ended,
        eod_inside=eods - ended,
        beginning=tokenizer.decode(ids[: min(show, per_document[0])].tolist()),
    )
