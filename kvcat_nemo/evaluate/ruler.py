"""RULER-style synthetic tasks over a compressed cache (ruler_tasks.py); the model answers in its own words.

    accuracy   share of the wanted answers that stand in the greedily decoded text, percent, mean over examples
    whole      share of examples with all of them, percent

Wording and word lists are ours and there are no worked examples in the prompt: figures compare models, compressors and
budgets with each other, not with RULER's published ones. Rows are per task and length, and per length over all tasks
(task "average").
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvcat_nemo.compress import generate
from kvcat_nemo.evaluate.haystack import sentences_of_files, text_fingerprint
from kvcat_nemo.evaluate.needle import QUESTIONS, numbers
from kvcat_nemo.evaluate.question_protocol import Ask, AskedProtocol, Context, Tags
from kvcat_nemo.evaluate.ruler_tasks import TASKS
from kvcat_nemo.evaluate.statistics import mean, standard_error
from kvcat_nemo.tokens import beginning, end_ids, following_ids, text_of


@dataclass(kw_only=True)
class Ruler(AskedProtocol):
    """RULER-style synthetic tasks."""

    name: ClassVar[str] = "ruler"
    shown: ClassVar[tuple[str, ...]] = (
        "question_aware",
        "length",
        "accuracy",
        "accuracy_se",
        "whole",
        "slots",
    )

    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    """Of ruler_tasks.TASKS."""
    lengths: list[str] = field(default_factory=lambda: ["1024"])
    """Tokens of the context, at most."""
    samples: int = 10
    """Examples of each task and length; `limit` takes the first of them."""
    question: str = "unknown"
    """Whether the compressor sees the question: unknown or known."""
    text: list[str] = field(default_factory=list)
    """Files or folders whose sentences things are hidden in; made-up ones when there is none."""

    @property
    def question_aware(self) -> bool:
        return self.question == "known"

    def check_own(self) -> list[str]:
        if self.question not in QUESTIONS:
            raise ValueError(f"question={self.question!r}: choose among {', '.join(QUESTIONS)}")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples}: give at least 1")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"tasks: {task!r} is not known; choose among {', '.join(TASKS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={','.join(self.tasks)!r}: give each task once, and at least one")
        numbers(self.lengths, "lengths", int, 1)
        return [f"tasks        {', '.join(self.tasks)}; {self._count} examples each"]

    @property
    def _count(self) -> int:
        return self.samples if self.limit is None else min(self.samples, self.limit)

    def contexts(self, tokenizer, context: int | None) -> list[Context]:
        text = sentences_of_files(self.text) if self.text else []
        return [
            self._context(tokenizer, text, task, length, number)
            for number in range(self._count)
            for length in numbers(self.lengths, "lengths", int, 1)
            for task in self.tasks
        ]

    def _context(self, tokenizer, text: list[str], task: str, length: int, number: int) -> Context:
        rng = random.Random(f"{self.seed} {task} {length} {number}")
        first = beginning(tokenizer, self.bos)
        example = TASKS[task](lambda part: following_ids(tokenizer, part), rng, length - len(first), text)
        question, cue = (following_ids(tokenizer, text) for text in (example.question, example.cue))
        ids, prompt = first + example.ids, question + cue
        if self.question_aware:
            ids, prompt = ids + question, cue
        payload = {"answers": list(example.answers), "answer_tokens": example.max_new_tokens}
        return Context(
            str(number), ids, (Ask("q", prompt, payload),), (("task", task), ("length", str(length)))
        )

    def own_settings(self) -> dict[str, Any]:
        return self.settings("question")

    def data_facts(self) -> dict[str, Any]:
        return {"text": text_fingerprint(self.text)}

    def measure(self, model, tokenizer, cache, ask: Ask) -> dict[str, Any]:
        stop, limit = end_ids(tokenizer, model), ask.payload["answer_tokens"]
        out = text_of(tokenizer, generate(model, cache, ask.prompt, max_new_tokens=limit, stop_ids=stop))
        return {
            "found": found(ask.payload["answers"], out),
            "wanted": len(ask.payload["answers"]),
            "said": out,
        }

    def figures(self, items: list[dict], asked: list[Ask]) -> dict[str, Any]:
        share = [100.0 * item["found"] / item["wanted"] for item in items]
        whole = [100.0 * (item["found"] == item["wanted"]) for item in items]
        return {
            **{"accuracy": mean(share), "accuracy_se": standard_error(share)},
            **{"whole": mean(whole), "whole_se": standard_error(whole)},
            "share_by_item": share,
        }

    def grouped(self, groups: dict[Tags, list[Context]]) -> dict[Tags, list[Context]]:
        out = dict(groups)
        if len(self.tasks) > 1:
            for tags, contexts in groups.items():
                average = (("task", "average"), tags[1])
                out[average] = out.get(average, []) + contexts
        return out


def found(answers: list[str], said: str) -> int:
    """How many of the answers stand in the text as words of their own, capitals aside."""
    return sum(bool(re.search(rf"(?<![\w-]){re.escape(a)}(?![\w-])", said, re.IGNORECASE)) for a in answers)
