"""The settings of every protocol: the one place where its options, their defaults, units and ranges are declared.

`kvcat evaluate NAME` and a sweep's entries are made of these classes; their docstrings are the commands' help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcat_nemo.data.benchmarks import BENCHMARKS
from kvcat_nemo.evaluate.options import Settings, option
from kvcat_nemo.evaluate.ruler_tasks import TASKS
from kvcat_nemo.evaluate.windows import CONTINUATION, PREFIX
from kvcat_nemo.tokens import BOS

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(kw_only=True)
class ProtocolSettings(Settings):
    """Settings of all protocols."""

    about: ClassVar[str] = ""
    """One line for the list of commands."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Figures of a row that the command prints, besides what the row is about."""

    models: list[str] = option(help="Hugging Face model folders, each as FOLDER or NAME=FOLDER.")
    out: str = option(help="Folder of the results; one that is there is gone on with.")
    limit: int | None = option(None, "Measure the first N items only.", least=1, metavar="N")
    dtype: str = option("float32", "Of weights and cache.", choices=DTYPES)
    device: str = option("auto", "As torch names it; auto: CUDA if there is one.")
    threads: int | None = option(None, "CPU threads.", least=1, unset="torch's choice")
    batch_size: int = option(1, "Items that go through the model together.", least=1)
    seed: int = option(0, "Of everything that is drawn.")


@dataclass(kw_only=True)
class CompressionSettings(ProtocolSettings):
    """Settings of protocols that measure compressors at budgets."""

    compressors: list[str] = option(
        ["attention-matching"],
        "Comma-separated: NAME or NAME:setting=value:…, stacked with + (random+int8); SPEC@KEEP gives one a budget of"
        " its own (int8@1). `kvcat compress --list` shows the names.",
    )
    keep: list[str] = option(
        ["0.05", "0.1", "0.2", "0.4"],
        "Comma-separated budgets: kept fractions (0.1 keeps a tenth), or kept slots (76t).",
    )
    bos: str = option(
        "auto", "BOS before each text: auto: as the model's tokenizer puts it there by itself.", choices=BOS
    )


@dataclass(kw_only=True)
class WindowSettings(CompressionSettings):
    """Settings of protocols over windows of text."""

    windows: int | str = option(
        20,
        'How many to cut from the text, or a JSON file of them: a list of {"source", "doc", "start", "ids"}.',
    )
    text: list[str] = option(
        [], "File or folder to cut windows from; may be given several times.", repeated=True
    )
    corpora: list[str] = option(
        [],
        "Comma-separated named corpora to cut from (`kvcat data fetch --help`).",
        unset="six of them",
    )
    corpora_folder: str = option("data/corpora", "Where they are kept, fetched or not.")
    min_chars_per_token: float = option(
        3.0, "Windows with fewer characters a token (tables, hexadecimal) are passed over; 0 takes all."
    )
    prefix: int = option(PREFIX, "Tokens whose cache is compressed.")
    continuation: int = option(CONTINUATION, "Tokens that follow.")


@dataclass(kw_only=True)
class QuestionSettings(CompressionSettings):
    """Settings of protocols that ask about a context, one context at a time."""

    batch_size: int = option(1, "Contexts go through the model one by one.", least=1, on_command_line=False)


@dataclass(kw_only=True)
class HiddenSettings(QuestionSettings):
    """Settings of protocols that hide things in text."""

    samples: int = option(10, "Examples of each kind; --limit takes the first of them.", least=1)
    question: str = option(
        "unknown",
        "Whether the compressor sees the question; rows say which.",
        choices=("unknown", "known"),
    )
    text: list[str] = option(
        [], "File or folder whose sentences are the text.", unset="made-up sentences", repeated=True
    )


@dataclass(kw_only=True)
class ContinuationSettings(WindowSettings):
    """Compress the cache of each window's first part and score its second part, for every MODEL (a Hugging Face
    folder, or NAME=folder), compressor and budget.

    The first token of the continuation is predicted by the uncompressed prefill and is not scored: of 256 tokens that
    follow, 255 are. ppl = exp of the mean NLL over all predictions; delta_ppl = ppl − ppl_dense; kl = KL(dense ‖
    compressed) in nats per token; top1 = agreement of the likeliest token in percent; slots are per layer and KV head.

    \b
    Examples:
      kvcat evaluate continuation models/smollm2-135m --out results/continuation
      kvcat evaluate continuation base=models/smollm2-135m kvcat=results/run/model \\
        --compressors attention-matching,attention-matching+int4,recent:sinks=4,int8@1 --keep 0.05,0.1 \\
        --windows 20 --text my_texts/ --out results/before_after
      kvcat evaluate continuation models/smollm2-135m --windows windows.json --limit 5 --out results/quick
    """

    name: ClassVar[str] = "continuation"
    about: ClassVar[str] = "perplexity of a text's second part, its first part compressed (ΔPPL, KL, top-1)"
    shown: ClassVar[tuple[str, ...]] = (
        *("ppl_dense", "delta_ppl", "delta_ppl_se", "kl", "top1", "slots", "seconds"),
    )


@dataclass(kw_only=True)
class GradientSettings(WindowSettings):
    """Train the slots of a small cache until it says what the full one says, and log ΔPPL after every step.

    With several MODELs, speed_up is the first model's steps divided by the step at which another one is as good as the
    first one is at its end. This is slow: each step passes the continuation forwards and backwards.

    \b
    Examples:
      kvcat evaluate gradient base=models/smollm2-135m kvcat=results/run/model --windows 4 --out results/gradient
      kvcat evaluate gradient models/smollm2-135m --lessons repeat --keep 0.1 --steps 50 --every 5 --out results/g
    """

    name: ClassVar[str] = "gradient"
    about: ClassVar[str] = "ΔPPL per step while the slots of a small cache are trained"
    shown: ClassVar[tuple[str, ...]] = (
        *("lessons", "ppl_dense", "delta_ppl_start", "delta_ppl", "steps", "speed_up"),
    )

    compressors: list[str] = option(
        ["recent:sinks=4"], "Comma-separated; whose slots are trained, unquantised."
    )
    keep: list[str] = option(["0.05"], "Comma-separated budgets: 0.05 (fraction) or 38t (slots).")
    steps: int = option(30, "Adam steps.", least=1)
    lr: float = option(
        0.02, "Learning rate, relative to the size of keys and values.", above=0, hint="0.02 is usual"
    )
    every: int = option(1, "Score after every so many steps, and after the last.", least=1)
    lessons: str = option(
        "continuation",
        "What the slots learn: the tokens that are scored, the prefix once more, or the model's own text.",
        choices=("continuation", "repeat", "sample"),
    )
    lesson_count: int = option(2, "Texts, for repeat and sample.", least=1)
    lesson_tokens: int = option(128, "Tokens of each, for repeat and sample.")


@dataclass(kw_only=True)
class NeedleSettings(HiddenSettings):
    """Hide a six-digit pass key in a text, compress the text's cache, and ask for the key: accuracy by budget, depth and
    length, for every MODEL (a Hugging Face folder, or NAME=folder).

    \b
    Examples:
      kvcat evaluate needle models/smollm2-135m --keep 0.1,0.3,0.5 --out results/needle
      kvcat evaluate needle base=models/smollm2-135m kvcat=results/run/model --question known \\
        --compressors attention-matching,snapkv --lengths 1024,4096 --samples 20 --out results/needle_known
    """

    name: ClassVar[str] = "needle"
    about: ClassVar[str] = "a pass key in a long text, by budget, depth and length"
    shown: ClassVar[tuple[str, ...]] = (
        *("question_aware", "length", "depth", "accuracy", "digits", "nll", "slots"),
    )

    lengths: list[str] = option(
        ["1024"], "Comma-separated; tokens of the haystack, key included.", number=int, least=1
    )
    depths: list[str] = option(
        ["0", "0.25", "0.5", "0.75", "1"],
        "Comma-separated; where the key stands: 0 first, 1 last.",
        number=float,
        least=0,
        most=1,
        hint="0 is first, 1 is last",
    )


@dataclass(kw_only=True)
class RulerSettings(HiddenSettings):
    """RULER-style synthetic tasks over a compressed cache, answered in the model's own words, for every MODEL (a Hugging
    Face folder, or NAME=folder).

    \b
    Tasks:
      niah-single, niah-multikey, niah-multivalue, niah-multiquery   codes hidden in text
      variable-tracking                                              names that share a value through a chain
      common-words, frequent-words                                   what stands most often in a list

    \b
    Examples:
      kvcat evaluate ruler models/smollm2-135m --keep 0.2,0.5 --samples 5 --out results/ruler
      kvcat evaluate ruler models/smollm2-135m --tasks niah-single,variable-tracking --lengths 1024,4096 --out results/r
    """

    name: ClassVar[str] = "ruler"
    about: ClassVar[str] = "RULER-style synthetic tasks: needles of four kinds, variables, frequent words"
    shown: ClassVar[tuple[str, ...]] = (
        *("question_aware", "length", "accuracy", "accuracy_se", "whole", "slots"),
    )

    tasks: list[str] = option(
        list(TASKS), "Comma-separated.", choices=tuple(TASKS), each="task", unset="all seven"
    )
    lengths: list[str] = option(
        ["1024"], "Comma-separated; tokens of the context, at most.", number=int, least=1
    )


@dataclass(kw_only=True)
class LongQASettings(QuestionSettings):
    """Questions on long documents: the document's cache is compressed, never the question; one compressed document
    answers all its questions. For every MODEL (a Hugging Face folder, or NAME=folder).

    --limit N asks N questions, of as many documents as possible.

    \b
    Examples:
      kvcat evaluate long-qa models/smollm2-135m --limit 40 --keep 0.1,0.5 --out results/qasper
      kvcat evaluate long-qa MODEL --questions longbench-v2 --file data.json --max-tokens 8000 --out results/longbench
    """

    name: ClassVar[str] = "long-qa"
    about: ClassVar[str] = "questions on long documents: QASPER, SQuAD's articles, LongBench v2"
    shown: ClassVar[tuple[str, ...]] = (
        *(
            "difficulty",
            "items",
            "accuracy",
            "accuracy_se",
            "balanced_accuracy",
            "f1",
            "exact",
            "nll",
            "slots",
        ),
    )

    questions: str = option(
        "qasper",
        "qasper: yes/no on research papers, fetched; squad: whole articles; longbench-v2: four options.",
        choices=("qasper", "squad", "longbench-v2"),
    )
    file: str | None = option(
        None, "SQuAD 1.1's JSON or bigbench's source package; LongBench v2's JSON.", file=True
    )
    options: str = option("letters", "How LongBench's options are answered.", choices=("letters", "texts"))
    max_tokens: int | None = option(
        None, "Longer documents lose their middle.", least=2, unset="what the model reads"
    )


@dataclass(kw_only=True)
class BaseAbilitySettings(ProtocolSettings):
    """HellaSwag, WinoGrande, PIQA, OpenBookQA, ARC-Easy and ARC-Challenge by lm-evaluation-harness, zero-shot, on local
    data: every MODEL (a Hugging Face folder, or NAME=folder), and each compared with the first one item by item.

    --limit N draws N items of each task.

    \b
    Examples:
      kvcat evaluate base-ability models/smollm2-135m --limit 200 --out results/base_ability
      kvcat evaluate base-ability before=models/smollm2-135m after=results/run/model --out results/ability
    """

    name: ClassVar[str] = "base-ability"
    about: ClassVar[str] = "six multiple-choice benchmarks over the full cache, before and after training"
    shown: ClassVar[tuple[str, ...]] = (
        *("before", "n", "accuracy", "accuracy_se", "difference", "difference_se", "p"),
    )

    tasks: list[str] = option(
        list(BENCHMARKS), "Comma-separated.", choices=tuple(BENCHMARKS), each="task", unset="all six"
    )
    data: str = option(
        "data/benchmarks",
        "Folder of TASK.jsonl files in the benchmarks' own fields; those that are missing are fetched.",
    )
    batch_size: int = option(
        16, "Requests per forward pass; padding makes the last digits depend on it.", least=1
    )
