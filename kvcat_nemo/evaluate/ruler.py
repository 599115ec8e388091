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
from dataclasses import dataclass
from typing import Any

from kvcat_nemo.compress import generate
from kvcat_nemo.evaluate.haystack import sentences_of_files
from kvcat_nemo.evaluate.question_protocol import Ask, Context, HiddenProtocol, Tags
from kvcat_nemo.evaluate.ruler_tasks import TASKS
from kvcat_nemo.evaluate.settings import RulerSettings
from kvcat_nemo.evaluate.statistics import mean, standard_error
from kvcat_nemo.tokens import beginning, end_ids, following_ids, text_of


@dataclass(kw_only=True)
class Ruler(RulerSettings, HiddenProtocol):
    """RULER-style synthetic tasks."""

    def check_own(self) -> list[str]:
        return [f"tasks        {', '.join(self.tasks)}; {self.count} examples each"]

    def contexts(self, tokenizer, context: int | None) -> list[Context]:
        text = sentences_of_files(self.text) if self.text else []
        return [
            self._context(tokenizer, text, task, length, number)
            for number in range(self.count)
            for length in map(int, self.lengths)
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
