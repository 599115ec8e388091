"""Proof that a Megatron checkpoint is the same model as a Hugging Face folder: weights, logits, decoded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from kvcat_nemo.conversion.arch import Architecture, load_architecture
from kvcat_nemo.conversion.exporting import MegatronModel, trained_differences
from kvcat_nemo.conversion.folders import hf_side
from kvcat_nemo.conversion.importing import check_source
from kvcat_nemo.conversion.layout import check_layout
from kvcat_nemo.conversion.ranks import run_ranks
from kvcat_nemo.conversion.safetensors_io import SafetensorsFolder
from kvcat_nemo.conversion.verify_rank import RankJob, greedy
from kvcat_nemo.conversion.weight_map import instances
from kvcat_nemo.models.hub import model_folder
from kvcat_nemo.runs.checkpoints import find_checkpoint
from kvcat_nemo.runs.integrity import require_unchanged
from kvcat_nemo.runs.pickles import check_common, check_format, check_index
from kvcat_nemo.runs.vocabulary import recorded
from kvcat_nemo.tokens import document_ids, has_tokenizer, load

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want "
    "of a wife. However little known the feelings or views of such a man may be on his first entering a "
    "neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered "
    "the rightful property of some one or other of their daughters."
)
"""Jane Austen, Pride and Prejudice (1813): the text that is compared unless another one is given."""

_MAX_TEXT_TOKENS = 96
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Report:
    """What `verify` found; `ok` only if every part of it holds."""

    ok: bool
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    tensors: int
    """Hugging Face tensors compared."""
    different_tensors: tuple[str, ...]
    """Those whose bytes differ after the way to Megatron and back."""
    stored_dtype: str
    text_tokens: int
    text_source: str
    precision: str
    """Of the computation: float32 or float64."""
    max_abs_difference: float
    """Of the logits, over all tokens and the whole vocabulary."""
    tolerance: float
    mean_kl: float
    """KL(Hugging Face ‖ Megatron) per token, nats."""
    top1_agreement: float
    """Share of tokens at which both name the same most probable next token."""
    decoded: tuple[int, ...]
    """Token ids that Megatron decodes greedily."""
    decoded_hf: tuple[int, ...]
    failures: tuple[str, ...]

    def as_dict(self) -> dict:
        return asdict(self)


def verify(
    hf_dir: str | Path,
    checkpoint: str | Path,
    *,
    layouts: Sequence[tuple[int, int]] = ((1, 1),),
    tolerance: float = 1e-4,
    new_tokens: int = 32,
    text: str | None = None,
    precision: str = "float32",
    timeout: float = 1800.0,
    unverified: bool = False,
) -> list[Report]:
    """Compare a Megatron checkpoint with a Hugging Face folder, once per layout.

    Args:
        hf_dir: a Hugging Face folder or a hub id.
        layouts: (tensor, pipeline) parallel sizes.
        tolerance: largest absolute difference of float32 logits that passes.
        new_tokens: tokens to decode greedily with both.
        text: compared text; TEXT when None.
        precision: "float32", or "float64" to tell rounding from error: tensor parallel ranks sum in another order.
        timeout: seconds for the Megatron processes of one layout.
        unverified: take a checkpoint without a manifest, of which nothing tells whether its files are whole.

    Raises:
        ValueError: when the checkpoint is not whole, one side cannot be read, a layout is impossible, or a rank fails. A difference between
            the models is no error: it is in the report.
    """
    hf_dir = model_folder(hf_dir)
    arch = load_architecture(hf_dir)
    for tp, pp in layouts:
        check_layout(arch, tp, pp)
    found = find_checkpoint(checkpoint, unverified=unverified)
    found.require_whole()
    require_unchanged(hf_dir)
    weights = found.weights
    check_format(weights)
    check_index(weights)
    check_common(weights)
    function = tuple(trained_differences(weights, hf_side(hf_dir)))
    compared, different, dtype = compare_weights(hf_dir, weights, arch, vocabulary=recorded(found))
    ids, source = _token_ids(hf_dir, arch, text)
    logits, decoded = hf_answer(hf_dir, ids, new_tokens, precision)
    reports = []
    for tp, pp in layouts:
        job = RankJob(str(weights), arch, tp, pp, tuple(ids), _prompt(ids), new_tokens, precision)
        (answer,) = run_ranks([job], timeout=timeout)
        reports.append(
            judge(
                answer,
                logits,
                decoded,
                tolerance=tolerance,
                precision=precision,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                tensors=compared,
                different_tensors=tuple(different),
                function=function,
                stored_dtype=dtype,
                text_tokens=len(ids),
                text_source=source,
            )
        )
    return reports


def compare_weights(
    hf_dir: str | Path, weights: Path, arch: Architecture, *, vocabulary: int | None = None
) -> tuple[int, list[str], str]:
    """(tensors compared, names of those that differ in any bit, stored dtype), one tensor at a time."""
    source = SafetensorsFolder(hf_dir)
    check_source(source, arch)
    model = MegatronModel.open(weights, arch, vocabulary=vocabulary)
    compared, different, dtypes = 0, [], set()
    for weight, layer in tqdm(list(instances(arch)), desc="weights", unit="tensor", disable=None):
        for name, ours in model.read(weight, layer):
            theirs = source.read(name).to(ours.dtype)
            bits = {4: torch.int32, 2: torch.int16}[ours.dtype.itemsize]
            if not torch.equal(ours.view(bits), theirs.view(bits)):
                different.append(name)
            compared += 1
            dtypes.add(str(ours.dtype).removeprefix("torch."))
            del ours, theirs
    return compared, different, "+".join(sorted(dtypes))


def hf_answer(
    hf_dir: str | Path, ids: list[int], new_tokens: int, precision: str = "float32"
) -> tuple[torch.Tensor, list[int]]:
    """Logits [T, V] of transformers' model, and what it decodes greedily."""
    from kvcat_nemo.models.load import load_causal_lm

    model = load_causal_lm(hf_dir, getattr(torch, precision), attn_implementation="eager")

    @torch.no_grad()
    def logits_of(tokens):
        return model(torch.tensor([tokens]), use_cache=False).logits[0]

    return logits_of(ids), greedy(logits_of, ids[: _prompt(ids)], new_tokens)


def judge(
    answer: dict, logits: torch.Tensor, decoded: list[int], *, tolerance: float, function=(), **known
) -> Report:
    """The report on Megatron's `answer`, measured against transformers' logits [T, V] and decoded tokens.

    Args:
        function: differences between config.json and what the checkpoint says of itself.
    """
    ours = answer["logits"]
    difference = float((ours - logits).abs().max())
    log_p, log_q = logits.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    failures = list(function)
    if known["different_tensors"]:
        names = known["different_tensors"]
        failures.append(f"{len(names)} of {known['tensors']} tensors differ, first {names[0]}")
    if not difference <= tolerance:  # not ">": NaN must fail too
        # Tensor parallel ranks sum in another order, which float32 shows where activations are large.
        hint = "; --precision float64 tells rounding from error" if known["precision"] == "float32" else ""
        failures.append(f"logits differ by {difference:.3g}, tolerance {tolerance:g}{hint}")
    if list(answer["decoded"]) != list(decoded):
        pairs = enumerate(zip(answer["decoded"], decoded, strict=True))
        first = next(i for i, (a, b) in pairs if a != b)
        failures.append(f"decoded tokens differ from token {first} on")
    return Report(
        ok=not failures,
        max_abs_difference=difference,
        tolerance=tolerance,
        mean_kl=kl,
        top1_agreement=float((ours.argmax(-1) == logits.argmax(-1)).double().mean()),
        decoded=tuple(answer["decoded"]),
        decoded_hf=tuple(decoded),
        failures=tuple(failures),
        **known,
    )


def _prompt(ids: list[int]) -> int:
    return min(_PROMPT_TOKENS, len(ids))


def _token_ids(hf_dir: Path, arch: Architecture, text: str | None) -> tuple[list[int], str]:
    limit = min(_MAX_TEXT_TOKENS, arch.seq_length)
    if not has_tokenizer(hf_dir):
        if text is not None:
            raise ValueError(f"{hf_dir} has no tokenizer, so --text cannot be used; add its tokenizer files")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(arch.vocab_size, (min(48, limit),), generator=generator).tolist()
        return ids, "random token ids (no tokenizer)"
    ids = document_ids(load(hf_dir), text or TEXT)[:limit]
    if len(ids) < 2:
        raise ValueError(f"--text has {len(ids)} token(s); give at least two")
    return ids, "text"
