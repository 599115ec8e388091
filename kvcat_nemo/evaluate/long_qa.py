"""Long-document questions: the document's cache is compressed, never the question, and all its questions are asked.

    qasper         research papers, yes/no questions (from a package)
    squad          whole articles, answers in words (SQuAD 1.1's JSON, or the source package of bigbench 1.0.0)
    longbench-v2   four options (the published JSON)

Options are scored by log-likelihood, so that base models can answer: the summed log-probability of " Yes" and " No", of
the letters " A" … " D" after a prompt that lists the options, or (options: texts) of the options' texts over their
bytes. Answers in words are decoded greedily up to a line's end.

    accuracy            share answered right, percent
    balanced_accuracy   mean over the right options of the share answered right among their questions: constant answers
                        give 50 % of two. Of QASPER's questions 67 % are "yes": read this one
    chance              what guessing gives, percent; first_option: how often the first option was chosen, percent
    nll                 −log softmax of the options' scores at the right one, nats; of the first answer's tokens (squad)
    f1, exact           SQuAD's, best over the accepted answers, percent
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvcat_nemo.common.files import sha256_of
from kvcat_nemo.compress import extend, generate, next_logits
from kvcat_nemo.data.assets import registry_assets
from kvcat_nemo.data.questions import (
    QADocument,
    Question,
    longbench_v2,
    sample_questions,
    squad_articles,
)
from kvcat_nemo.evaluate.needle import greedy_match
from kvcat_nemo.evaluate.question_protocol import Ask, Context, QuestionProtocol, Tags
from kvcat_nemo.evaluate.settings import LongQASettings
from kvcat_nemo.evaluate.statistics import mean, standard_error
from kvcat_nemo.tokens import IdRules, answer_ids, document_ids, end_ids, text_of

_ANSWER_TOKENS = 24


@dataclass(kw_only=True)
class LongQA(LongQASettings, QuestionProtocol):
    """Questions on long documents."""

    def check_own(self) -> list[str]:
        if (self.file is None) != (self.questions == "qasper"):
            wanted = "leave it out, it comes from a package" if self.file else "give the set's local file"
            raise ValueError(f"file={self.file!r}: for {self.questions}, {wanted}")
        return [f"questions    {self.limit or 'all'} of {self.questions}"]

    def _documents(self) -> list[QADocument]:
        if self.questions == "qasper":
            return registry_assets("qasper").yes_no_questions(say=lambda line: None)
        return (squad_articles if self.questions == "squad" else longbench_v2)(self.file)

    def contexts(self, tokenizer, context: int | None) -> list[Context]:
        asked: dict[str, tuple[QADocument, list[Ask]]] = {}
        for document, question in sample_questions(self._documents(), self.limit):
            ask = self._ask(tokenizer, question)
            asked.setdefault(document.id, (document, []))[1].append(ask)
        after = max(self._after(ask) for _, asks in asked.values() for ask in asks)
        room = min(x for x in (self.max_tokens, context and context - after, math.inf) if x)
        if room < 2:
            raise ValueError(
                f"the models read {context} tokens, the longest question and answer have {after}"
            )
        contexts, self._cut = [], 0
        for document, asks in asked.values():
            whole = document_ids(tokenizer, document.text, IdRules(self.bos))
            ids = cut_middle(whole, room)
            self._cut += len(ids) < len(whole)
            tags = tuple((n, v) for n, v in document.questions[0].facts.items() if n == "difficulty")
            contexts.append(Context(document.id, ids, tuple(asks), tags))
        return contexts

    def _ask(self, tokenizer, question: Question) -> Ask:
        head = f"\n\nQuestion: {question.text}"
        payload: dict[str, Any] = {"right": question.right, "answers": list(question.answers)}
        if self.questions == "squad":
            prompt, first = answer_ids(tokenizer, f"{head}\nAnswer:", f" {question.answers[0]}")
            payload |= {"first": first, "answer_tokens": max(_ANSWER_TOKENS, len(first))}
            return Ask(question.id, prompt, payload)
        options, bytes_of = question.options, None
        if self.questions == "qasper":
            head += " Answer yes or no."
        elif self.options == "letters":
            head += "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", options, strict=True))
            options = tuple("ABCD")
        else:
            bytes_of = [len(text.encode()) for text in options]
        parted = [answer_ids(tokenizer, f"{head}\nAnswer:", f" {text}") for text in options]
        scored = [ids for _, ids in parted]
        payload |= {"options": scored, "bytes": bytes_of, "answer_tokens": max(map(len, scored))}
        return Ask(question.id, parted[0][0], payload)

    def own_settings(self) -> dict[str, Any]:
        return self.settings("questions", "options", "max_tokens")

    def told(self) -> dict[str, Any]:
        return {"options": {**super().told()["options"], "documents_cut": self._cut}}

    def data_facts(self) -> dict[str, Any]:
        return {"file": registry_assets("qasper").SHA256 if self.file is None else sha256_of(Path(self.file))}

    def measure(self, model, tokenizer, cache, ask: Ask) -> dict[str, Any]:
        if self.questions == "squad":
            return self._words(model, tokenizer, cache, ask)
        scores = option_scores(model, cache, ask.prompt, ask.payload["options"])
        if ask.payload["bytes"]:
            scores = [score / size for score, size in zip(scores, ask.payload["bytes"], strict=True)]
        chosen = max(range(len(scores)), key=scores.__getitem__)
        nll = -torch.tensor(scores, dtype=torch.float64).log_softmax(-1)[ask.payload["right"]].item()
        return {"chosen": chosen, "right": ask.payload["right"], "nll": nll, "scores": scores}

    def _words(self, model, tokenizer, cache, ask: Ask) -> dict[str, Any]:
        stop = end_ids(tokenizer, model)
        out = generate(model, cache, ask.prompt, max_new_tokens=ask.payload["answer_tokens"], stop_ids=stop)
        said = text_of(tokenizer, out).strip().partition("\n")[0]
        nll = greedy_match(model, cache, ask.prompt, ask.payload["first"])["nll"]
        answers = ask.payload["answers"]
        return {"said": said, "f1": best(f1, said, answers), "exact": best(exact, said, answers), "nll": nll}

    def figures(self, items: list[dict], asked: list[Ask]) -> dict[str, Any]:
        nll = [item["nll"] for item in items]
        shared = {"nll": mean(nll), "nll_se": standard_error(nll), "nll_by_item": nll}
        if self.questions == "squad":
            out = {}
            for name in ("f1", "exact"):
                values = [100.0 * item[name] for item in items]
                out |= {name: mean(values), f"{name}_se": standard_error(values), f"{name}_by_item": values}
            return {**out, **shared}
        right = [100.0 * (item["chosen"] == item["right"]) for item in items]
        return {
            **{"accuracy": mean(right), "accuracy_se": standard_error(right)},
            **balanced([item["right"] for item in items], right),
            "chance": 100 / len(items[0]["scores"]),
            "first_option": 100 * mean([item["chosen"] == 0 for item in items]),
            **shared,
            "correct_by_item": [int(x > 0) for x in right],
        }

    def grouped(self, groups: dict[Tags, list[Context]]) -> dict[Tags, list[Context]]:
        if list(groups) == [()]:
            return groups
        return {**groups, (("difficulty", "all"),): [c for contexts in groups.values() for c in contexts]}


def cut_middle(ids: list[int], room: int | float) -> list[int]:
    """At most `room` tokens: the first and the last ones of a longer text."""
    if len(ids) <= room:
        return ids
    first = -(-int(room) // 2)
    return ids[:first] + ids[len(ids) - (int(room) - first) :]


def option_scores(model, cache, prompt: list[int], options: list[list[int]]) -> list[float]:
    """Summed log-probability (nats) of each option's tokens after cache and prompt; the cache stays as it is."""
    device = cache.lengths_B.device
    logits, grown = extend(model, cache, torch.tensor([prompt], device=device))
    first_V = logits[0, -1].float().log_softmax(-1)
    scores = []
    for option in options:
        score = first_V[option[0]].item()
        if len(option) > 1:
            logits_NV = next_logits(model, grown, torch.tensor([option[:-1]], device=device))[0].float()
            targets = torch.tensor(option[1:], device=device)
            score -= torch.nn.functional.cross_entropy(logits_NV, targets, reduction="sum").item()
        scores.append(score)
    return scores


def balanced(right_options: list[int], right: list[float]) -> dict[str, float | None]:
    """Mean over options of the share (percent) answered right where that option is right, and its standard error."""
    groups = [
        [y for x, y in zip(right_options, right, strict=True) if x == k] for k in sorted(set(right_options))
    ]
    errors = [standard_error(group) for group in groups]
    error = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(groups)
    return {"balanced_accuracy": mean([mean(g) for g in groups]), "balanced_accuracy_se": error}


def _words_of(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact(said: str, answer: str) -> float:
    """1 when both have the same words, articles and punctuation aside (SQuAD's exact match)."""
    return float(_words_of(said) == _words_of(answer))


def f1(said: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words, articles and punctuation aside (SQuAD's F1)."""
    a, b = Counter(_words_of(said)), Counter(_words_of(answer))
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def best(score: Callable[[str, str], float], said: str, answers: list[str]) -> float:
    """The score against the answer that it fits best."""
    return max(map(partial(score, said), answers))
