"""A base model's folder (kvcat convert import): where its tokenizer is, and whether a configuration fits it."""

from __future__ import annotations

from pathlib import Path

from kvcat_nemo.models.function import Function, differences, function_of_settings, stored_function
from kvcat_nemo.runs.integrity import examine, has_manifest
from kvcat_nemo.runs.layout import CARD, MANIFEST


def tokenizer_dir(base: str | Path) -> Path:
    """The Hugging Face part (configuration and tokenizer) of a converted base model.

    Raises:
        ValueError: when the folder is not one that `kvcat convert import` wrote.
    """
    folder = Path(base) / "hf"
    if not (Path(base) / CARD).is_file() or not folder.is_dir():
        raise ValueError(
            f"{base}: not a converted base model (it lacks {CARD}). Make one: kvcat convert import HF_DIR {base}"
        )
    return folder


def require_base(base: str | Path, *, unverified: bool) -> None:
    """Refuse a base that nothing tells to be whole, or whose files have other names or sizes than its manifest says.

    Hashes are compared by all ranks together, before the base is loaded (nemo.checkpoint_check).

    Raises:
        ValueError: says what to do.
    """
    if not has_manifest(base):
        if not unverified:
            raise ValueError(
                f"resume.base={str(base)!r} has no {MANIFEST}: an older kvcat imported it, or another program wrote it. Import it again "
                f"(kvcat convert import HF_DIR {base} --force), or, if you trust it, set resume.unverified=True"
            )
        return
    standing = examine(base, hashes=False)
    if not standing.whole:
        raise ValueError(f"resume.base={str(base)!r}: {standing.why_not}")


def check_base(base: str | Path, config) -> bool:
    """Compare everything that changes a model's function with the base model that a run is to start from.

    Args:
        base: an imported folder or a training checkpoint; config: a built model configuration.

    Returns:
        Whether the base says what it is. A checkpoint from before there were records may not.

    Raises:
        ValueError: naming the first field that differs, both values and the fix.
    """
    stored = stored_function(base)
    if stored is None:
        return False
    _compare(config, stored[0], f"the base model {base} has", "choose its recipe, or set {}")
    return True


def check_resumed(checkpoint: str | Path, config) -> None:
    """Compare a run's configuration with a checkpoint that the run may go on from, as `check_base`."""
    try:
        stored = stored_function(checkpoint)
    except ValueError:
        return  # a damaged record: the manifest will say so, and the checkpoint is set aside (nemo.checkpoint_check)
    if stored is not None:
        _compare(
            config,
            stored[0],
            f"the run's checkpoint {checkpoint} was trained with",
            "start it as before ({}), or give the run another log.name",
        )


def trained_function(config) -> Function:
    """What a run with this configuration trains, for its checkpoints' record."""
    return function_of_settings(vars(config))


def _compare(config, wanted: Function, whose: str, fix: str) -> None:
    for name, (ours, theirs) in differences(trained_function(config), wanted).items():
        raise ValueError(
            f"model.config.{name}={ours!r}, but {whose} {theirs!r}: {fix.format(_override(name, theirs))}"
        )


def _override(name: str, value) -> str:
    """How a command line sets a field."""
    if name == "rope_scaling":
        value = value or {"rope_type": "default"}
        return f'"model.config.rope_scaling={str(value).replace(" ", "")}"'
    if isinstance(value, float) and value == int(value):
        value = int(value)  # NeMo takes rotary_base for a whole number
    return f"model.config.{name}={value!r}"
