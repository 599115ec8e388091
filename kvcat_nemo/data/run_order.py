"""What a run's order of windows hangs on, written down, and what another setting does to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvcat_nemo.data.window_counts import check_epochs, contents, epochs_needed, split_shares, tokens_of

FORMAT = 1
EPOCHS, MEGATRON, RECALL = "epochs", "megatron", "recall"
"""Orders: engine.epochs; Megatron's own, which hangs on the number of windows; synthetic windows by their number."""


@dataclass(frozen=True)
class Change:
    """A setting that is not as it was when the run began."""

    field: str
    before: Any
    now: Any
    effect: str
    refused: bool

    def __str__(self) -> str:
        return f"{self.field}={self.now!r}, which was {self.before!r}: {self.effect}"


ORDER = "the windows that are left would be others, in another order: some would be read again and some never"
# Name in the record → (name that a user sets, what another value does, whether it is refused).
_FIELDS: dict[str, tuple[str, str, bool]] = {
    "seed": ("data.seed", ORDER, True),
    "seq_length": ("data.seq_length", ORDER, True),
    "vocab_size": ("data.vocab_size", ORDER, True),
    "train/weights": ("data.paths (weights of the train part)", ORDER, True),
    "train/shares": ("data.split (the train part)", ORDER, True),
    "train/contents": ("data.paths (the train part)", ORDER, True),
    "validation/weights": (
        "data.paths (weights of the validation part)",
        "validation figures are of other windows than before",
        False,
    ),
    "validation/shares": (
        "data.split (the validation part)",
        "validation figures are of other windows than before",
        False,
    ),
    "validation/contents": (
        "data.paths (the validation part)",
        "validation figures are of other windows than before",
        False,
    ),
    "global_batch_size": (
        "data.global_batch_size",
        "the order of windows stays; a step has another number of them",
        False,
    ),
    "validation_windows": (
        "windows of a validation (trainer.limit_val_batches × data.global_batch_size)",
        "validation figures are of more or fewer windows than before",
        False,
    ),
    "packed_documents": (
        "data.packed_documents",
        "the windows stay; what a document sees is another",
        False,
    ),
    "eod_mask_loss": (
        "data.eod_mask_loss",
        "the windows stay; the loss counts other tokens",
        False,
    ),
    "eod": (
        "data.tokenizer (its end-of-document token)",
        "the windows stay; documents end at another token",
        False,
    ),
}


def parts(prefixes: Sequence[str], weights: Sequence[float] | None, share=(0.0, 1.0)) -> list[dict[str, Any]]:
    """A split's datasets: what they hold, which share of their documents is read, with which weight."""
    out = []
    for i, prefix in enumerate(prefixes):
        documents, tokens = tokens_of(prefix, tuple(share))
        out.append(
            {
                "prefix": str(prefix),
                "weight": None if weights is None else float(weights[i]) / float(sum(weights)),
                "share": [float(x) for x in share],
                "documents": documents,
                "tokens": tokens,
                "digest": contents(prefix),
            }
        )
    return out


def splits_of(blend, blend_per_split, split: str | None) -> dict[str, list[dict[str, Any]] | None]:
    """{train, validation, test} → `parts`, from what Megatron is given; None: there is no such split."""
    names = ("train", "validation", "test")
    if blend_per_split is not None:
        return {
            name: None if one is None else parts(*one)
            for name, one in zip(names, blend_per_split, strict=True)
        }
    shares = split_shares(split)
    return {
        name: None if share is None else parts(*blend, share)
        for name, share in zip(names, shares, strict=True)
    }


def check_parts(
    splits: Mapping[str, list[dict[str, Any]] | None], wanted: Mapping[str, int | None], seq_length: int
) -> None:
    """Refuse a split that has no tokens, or is asked for absurdly many epochs, before anything is built of it.

    Args:
        splits: as of `splits_of`; wanted: windows that are asked of each (None: one epoch).

    Raises:
        ValueError: naming the split, the dataset and the fix.
    """
    for name, datasets in splits.items():
        if not datasets or wanted.get(name) == 0:
            continue
        for one in datasets:
            what = f"data.paths: the {name} split of {one['prefix']} ({one['documents']:,} documents)"
            windows = wanted.get(name)
            if windows is not None and one["weight"] is not None:
                windows = int(windows * one["weight"]) + 1
            check_epochs(
                epochs_needed(windows, one["tokens"], seq_length, what=what), one["documents"], what=what
            )


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's settings under the names of the table above."""
    out = {key: value for key, value in record.items() if key in _FIELDS}
    for name in ("train", "validation"):
        if (datasets := record.get(name)) is not None:
            out[f"{name}/weights"] = [d["weight"] for d in datasets]
            out[f"{name}/shares"] = [d["share"] for d in datasets]
            out[f"{name}/contents"] = [d["digest"] for d in datasets]
    return out


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs, in the order of the table.

    Raises:
        ValueError: when the record is of a later version of this project.
    """
    if before.get("format") != FORMAT:
        raise ValueError(
            f"the run's order of windows is written in format {before.get('format')!r}; this version reads {FORMAT}. "
            "Resume with the version that began the run, or start a new run (log.name=NEW, resume.base=CHECKPOINT)"
        )
    old, new, out = flat(before), flat(now), []
    if (before["index"] == RECALL) != (now["index"] == RECALL):
        return [Change("data", before["index"], now["index"], ORDER, True)]
    for name, (field, effect, refused) in _FIELDS.items():
        if name not in old or name not in new or old[name] == new[name]:
            continue
        a, b = old[name], new[name]
        if name.endswith("/shares") and before.get("split") != now.get("split"):
            a, b = before.get("split"), now.get("split")  # as the user writes it
        if name.endswith("/contents"):  # names say more than digests
            side = name.partition("/")[0]
            a, b = ([d["prefix"] for d in record[side]] for record in (before, now))
            if a == b:
                effect = f"the files are not those that the run has read. {effect}"
        out.append(Change(field, a, b, effect, refused))
    if before["index"] == now["index"] == MEGATRON and before["train_windows"] != now["train_windows"]:
        # Within one epoch Megatron's order is the same however many windows are asked for.
        single = [r["train"][0]["tokens"] if len(r["train"]) == 1 else 0 for r in (before, now)]
        most = max(before["train_windows"], now["train_windows"]) * now["seq_length"]
        if not 0 < most < min(single):
            out.append(
                Change(
                    "windows of the run (trainer.max_steps × data.global_batch_size)",
                    before["train_windows"],
                    now["train_windows"],
                    f"the run was begun with Megatron's own order, which hangs on them; {ORDER}",
                    True,
                )
            )
    return out


def refusal(found: Sequence[Change], checkpoint: str) -> str | None:
    """The message on those changes that are refused; None when there are none."""
    refused = [change for change in found if change.refused]
    if not refused:
        return None
    listed = "; ".join(str(change) for change in refused)
    return (
        f"{listed}. The run's order of windows is kept in {checkpoint}. Set what it was; or start a new run from the weights "
        f"(log.name=NEW resume.base={checkpoint}); or take the new data from here on with data.on_change=say"
    )
