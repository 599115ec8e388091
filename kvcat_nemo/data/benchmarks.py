"""Six multiple-choice benchmarks as JSON lines in the fields of their authors' releases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's validation split."""

    check: Callable[[dict], str | None]
    """What is wrong with a record, or None."""
    about: str
    """One line for `--help`."""


def _strings(record: dict, *names: str) -> str | None:
    for name in names:
        if name not in record:
            return f"no field {name!r}; fields present: {', '.join(record) or 'none'}"
        if not isinstance(record[name], str) or not record[name].strip():
            return f"field {name!r} must be a text that is not empty, is {record[name]!r}"
    return None


def _label(record: dict, name: str, allowed: tuple) -> str | None:
    if name not in record:
        return f"no field {name!r}; fields present: {', '.join(record)}"
    if record[name] not in allowed or isinstance(record[name], bool):
        return f"field {name!r} is {record[name]!r}, must be one of {', '.join(map(repr, allowed))}"
    return None


def _hellaswag(record: dict) -> str | None:
    endings = record.get("endings")
    if not isinstance(endings, list) or len(endings) != 4 or not all(isinstance(x, str) for x in endings):
        return "field 'endings' must be a list of 4 texts"
    for name in ("ctx_a", "ctx_b"):  # either may be empty
        if not isinstance(record.get(name), str):
            return f"field {name!r} must be a text"
    return _strings(record, "activity_label") or _label(record, "label", ("0", "1", "2", "3"))


def _winogrande(record: dict) -> str | None:
    problem = _strings(record, "sentence", "option1", "option2") or _label(record, "answer", ("1", "2"))
    if problem is None and record["sentence"].count("_") != 1:
        return "field 'sentence' must hold one '_' where the option goes"
    return problem


def _piqa(record: dict) -> str | None:
    return _strings(record, "goal", "sol1", "sol2") or _label(record, "label", (0, 1))


def _choices(question: str) -> Callable[[dict], str | None]:
    def check(record: dict) -> str | None:
        if problem := _strings(record, question, "answerKey"):
            return problem
        choices = record.get("choices")
        texts, labels = (choices.get(k) for k in ("text", "label")) if isinstance(choices, dict) else (0, 0)
        if (
            not isinstance(texts, list)
            or not isinstance(labels, list)
            or len(texts) != len(labels)
            or not texts
        ):
            return "field 'choices' must be {'text': […], 'label': […]} with as many texts as labels"
        return _label(record, "answerKey", tuple(labels))

    return check


BENCHMARKS = {
    "hellaswag": Benchmark(_hellaswag, "which ending follows; 10,042 items"),
    "winogrande": Benchmark(_winogrande, "what a gap refers to; 1,267"),
    "piqa": Benchmark(_piqa, "physical common sense; 1,838 items"),
    "openbookqa": Benchmark(_choices("question_stem"), "elementary science; 500"),
    "arc_easy": Benchmark(_choices("question"), "grade-school science; 570 items"),
    "arc_challenge": Benchmark(_choices("question"), "the harder ones; 299"),
}
"""Named as lm-evaluation-harness names them; all are validation splits."""


def load_benchmark(name: str, path: str | Path) -> list[dict[str, Any]]:
    """Read a benchmark's JSON lines and check every record.

    Raises:
        ValueError: unknown name, no such file, or a record that can't be used; the message names line and field.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    records = read_jsonl(path, f"`kvcat data fetch {name} {path}` makes it")
    check_records(records, name, str(path))
    return records


def read_jsonl(path: str | Path, hint: str) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; `hint` tells the user where such a file comes from.

    Raises:
        ValueError: no such file, an empty one, or a line that isn't a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {hint}")
    records = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: a JSON {type(record).__name__}, not an object")
            records.append(record)
    if not records:
        raise ValueError(f"{path}: holds no record; {hint}")
    return records


def check_records(records: list[dict], name: str, where: str) -> None:
    """Refuse records that are no items of a benchmark.

    Raises:
        ValueError: names the record and the field.
    """
    for number, record in enumerate(records, 1):
        if problem := BENCHMARKS[name].check(record):
            raise ValueError(f"{where}, record {number}: not a {name} item: {problem}")
