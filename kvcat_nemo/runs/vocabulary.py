"""Which rows of an embedding are padding? Only those may be cut off on export."""

from __future__ import annotations

from pathlib import Path

from kvcat_nemo.runs.checkpoints import Checkpoint
from kvcat_nemo.runs.layout import CARD, RunFolder, read_record

VOCABULARY, PADDED = "vocab_size", "padded_vocab_size"
"""Facts of a manifest: tokens of the vocabulary, and rows of the embedding."""


def recorded(checkpoint: Checkpoint) -> int | None:
    """The vocabulary that a checkpoint was saved with: from its manifest, its card, or its run's configuration; None when nothing tells.

    Raises:
        ValueError: for a card or configuration that cannot be read.
    """
    if checkpoint.manifest is not None and isinstance(size := checkpoint.manifest.facts.get(VOCABULARY), int):
        return size
    folder = checkpoint.folder
    for path, names in (
        (folder / CARD, ("architecture",)),
        (RunFolder.of_checkpoint(folder).config, ("model",)),
    ):
        if path.is_file():
            try:
                value = read_record(path)
                for name in names:
                    value = value[name]
                size = value.get("true_vocab_size") or value.get("vocab_size")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} cannot be read ({error!r})") from None
            if isinstance(size, int):
                return size
    return None


def padded(vocab_size: int, tensor_parallel: int, divisible_by: int) -> int:
    """Rows that Megatron makes of a vocabulary: a multiple of divisible_by × tensor_parallel."""
    multiple = tensor_parallel * divisible_by
    return -(-vocab_size // multiple) * multiple


def check_cut(
    *, vocab_size: int, rows: int, known: int | None, tensor_parallel: int, zero: bool, where: Path
) -> str:
    """May rows vocab_size… of the embedding be cut off? Returns a note for the user, or nothing.

    Args:
        vocab_size: what the base's config.json says.
        rows: of the stored embedding.
        known: the vocabulary that the checkpoint was saved with (`recorded`).
        tensor_parallel: into how many parts the rows were saved.
        zero: whether all rows from vocab_size on are zero.

    Raises:
        ValueError: when they may be tokens.
    """
    if known is not None and known != vocab_size:
        raise ValueError(
            f"vocab_size = {vocab_size} in the base's config.json, but {where} was saved with a vocabulary of {known}: rows "
            "would be lost, or invented. Name the base that it was trained from (--base)"
        )
    if known is not None or rows == vocab_size or zero:
        return ""
    if rows in {padded(vocab_size, tensor_parallel, by) for by in (1, 128)}:
        return (
            f"note: {rows - vocab_size} rows of the embedding beyond vocab_size = {vocab_size} are cut off as padding (it was saved "
            f"at tensor parallel size {tensor_parallel}); nothing records the vocabulary of {where}"
        )
    raise ValueError(
        f"vocab_size = {vocab_size} in the base's config.json, but {where} has {rows} rows of tokens, and the last {rows - vocab_size} are "
        f"not zero: Megatron would not pad {vocab_size} to {rows} at tensor parallel size {tensor_parallel}. Name the base that it "
        "was trained from (--base)"
    )
