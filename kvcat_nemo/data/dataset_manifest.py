"""manifest.json of a built dataset: what is in it, what it was made from, and whether it is all there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class SplitCounts:
    """One split of a dataset; lengths in tokens, end-of-document token included."""

    documents: int
    tokens: int
    shortest: int
    median: int
    longest: int


@dataclass(frozen=True)
class DatasetManifest:
    """What a dataset folder holds and what it came from."""

    format: int
    """Version of this layout."""
    splits: dict[str, SplitCounts]
    """"train" and, unless nothing was held out, "heldout"."""
    files: dict[str, dict]
    """File name → {"bytes", "sha256"}, all files but the manifest."""
    dtype: str
    """Type of a token id on disk."""
    tokenizer: dict
    """path (owner/name@commit for one of the hub), fingerprint, vocab_size, eod_token, eod_id; bos and special_tokens (tokens.IdRules), beginning (the ids before
    every document). Datasets that were built before these were kept have none of the three: nothing stands before
    their documents, and special tokens in texts are text."""
    source: dict
    """paths, files, documents, empty, duplicates, bad, fingerprint (sha256 over the texts), text_field; revisions
    (owner/name@commit) where a hub dataset is among the paths."""
    held_out: float
    """Share of documents asked to be held out."""
    seed: int
    """Seed of the split."""
    versions: dict[str, str]
    """Packages that made it."""
    seconds: float
    """Time the build took."""
    reused: bool = False
    """True when an existing dataset from the same inputs was found (never stored)."""

    def inputs(self) -> dict:
        """What decides the dataset's bytes; two manifests with equal inputs describe equal datasets."""
        return {
            "format": self.format,
            "texts": self.source["fingerprint"],
            "tokenizer": self.tokenizer["fingerprint"],
            "vocabulary": self.tokenizer["vocab_size"],
            "beginning": self.tokenizer.get("beginning", []),
            "special_tokens": self.tokenizer.get("special_tokens", "text"),
            "held_out": self.held_out,
            "seed": self.seed,
        }

    def write(self, folder: Path) -> None:
        value = dataclasses.asdict(self)
        del value["reused"]
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: str | Path) -> DatasetManifest:
    """Read a dataset's manifest and check that its files are there with the recorded sizes.

    Raises:
        ValueError: no manifest, another format, or files missing or of another size; the message names them.
    """
    folder = Path(folder)
    try:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']}, this version reads {FORMAT}")
        value["splits"] = {name: SplitCounts(**split) for name, split in value["splits"].items()}
        manifest = DatasetManifest(**value)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: no {MANIFEST}; not a dataset built by `kvcat data build`") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / MANIFEST}: not a dataset manifest ({error})") from error
    for name, record in manifest.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != record["bytes"]:
            found = "missing" if size is None else f"{size} bytes long"
            raise ValueError(
                f"{file} is {found}, the manifest says {record['bytes']} bytes; build the dataset again"
            )
    return manifest


def dataset_fingerprint(folder: str | Path) -> str:
    """sha256 over the contents of a dataset's token files, from the hashes its manifest recorded.

    Two datasets have equal fingerprints exactly when all their .bin and .idx files are equal byte by byte.

    Raises:
        ValueError: as `read_manifest`.
    """
    files = read_manifest(folder).files
    lines = [f"{name} {files[name]['sha256']}\n" for name in sorted(files) if name.endswith((".bin", ".idx"))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
