"""Needle: a six-digit pass key hidden in a long text, its cache compressed, and the key asked for.

A context is `length` tokens (at most one sentence fewer) of made-up or given text with the key at a depth: 0 first,
1 last. `question` says whether the compressor sees the question (question_protocol.py); rows never mix the two.

    accuracy   share of keys that greedy decoding gives in full, percent. Fed the key itself, every one of its tokens is
               the likeliest: the same as decoding, in one pass
    digits     share of the key's tokens that are the likeliest, percent
    nll        of the key, nats per token

Rows are per length and depth, and per length over all depths (depth "all").
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from kvcat_nemo.compress import next_logits
from kvcat_nemo.evaluate.haystack import filled, sentences_of_files, stream
from kvcat_nemo.evaluate.question_protocol import Ask, Context, HiddenProtocol, Tags
from kvcat_nemo.evaluate.settings import NeedleSettings
from kvcat_nemo.evaluate.statistics import mean, standard_error
from kvcat_nemo.tokens import answer_ids, beginning, following_ids

_NEEDLE = "The pass key is {key}. Keep it in mind: {key} is the pass key."
_QUESTION = "\n\nQuestion: What is the pass key that the text above mentions?\nAnswer:"
_CUE = " The pass key is"


@dataclass(kw_only=True)
class Needle(NeedleSettings, HiddenProtocol):
    """Passkey retrieval over a compressed cache."""

    def check_own(self) -> list[str]:
        return [f"needle       depth {', '.join(self.depths)}; {self.count} keys each"]

    def contexts(self, tokenizer, context: int | None) -> list[Context]:
        sentences = sentences_of_files(self.text) if self.text else []
        return [
            self._context(tokenizer, sentences, length, depth, number)
            for number in range(self.count)
            for length in map(int, self.lengths)
            for depth in map(float, self.depths)
        ]

    def _context(self, tokenizer, sentences: list[str], length: int, depth: float, number: int) -> Context:
        # One haystack and key for all depths: only the place differs.
        rng = random.Random(f"{self.seed} {length} {number}")
        key = str(rng.randrange(100_000, 1_000_000))
        first = beginning(tokenizer, self.bos)
        needle = [(depth, _NEEDLE.format(key=key))]
        hay = filled(
            lambda t: following_ids(tokenizer, t), stream(sentences, rng), needle, length - len(first)
        )
        prompt, answer = answer_ids(tokenizer, _QUESTION + _CUE, f" {key}")
        ids = first + hay
        if self.question_aware:
            question, prompt = answer_ids(tokenizer, _QUESTION, _CUE)
            ids += question
        ask = Ask("key", prompt, {"answer": answer, "answer_tokens": len(answer)})
        tags = (("length", str(length)), ("depth", f"{depth:g}"))
        return Context(str(number), ids, (ask,), tags)

    def measure(self, model, tokenizer, cache, ask: Ask) -> dict[str, Any]:
        return greedy_match(model, cache, ask.prompt, ask.payload["answer"])

    def figures(self, items: list[dict], asked: list[Ask]) -> dict[str, Any]:
        exact = [100.0 * item["exact"] for item in items]
        digits = [100.0 * item["first"] for item in items]
        nll = [item["nll"] for item in items]
        return {
            **{"accuracy": mean(exact), "accuracy_se": standard_error(exact)},
            **{"digits": mean(digits), "digits_se": standard_error(digits)},
            **{"nll": mean(nll), "nll_se": standard_error(nll)},
            "correct_by_item": [int(item["exact"]) for item in items],
        }

    def grouped(self, groups: dict[Tags, list[Context]]) -> dict[Tags, list[Context]]:
        out = dict(groups)
        for tags, contexts in groups.items():
            out.setdefault((tags[0], ("depth", "all")), [])
            out[tags[0], ("depth", "all")] += contexts
        return out


def greedy_match(model, cache, prompt: list[int], answer: list[int]) -> dict[str, float]:
    """Whether greedy decoding after cache and prompt gives the answer: "exact"; the share of its tokens that are the
    likeliest after the right ones before them: "first"; and its "nll", nats per token."""
    device = cache.lengths_B.device
    fed = torch.tensor([prompt + answer[:-1]], device=device)
    logits_AV = next_logits(model, cache, fed)[0, len(prompt) - 1 :].float()
    target_A = torch.tensor(answer, device=device)
    right = logits_AV.argmax(-1) == target_A
    nll = torch.nn.functional.cross_entropy(logits_AV, target_A).item()
    return {"exact": bool(right.all()), "first": right.double().mean().item(), "nll": nll}
