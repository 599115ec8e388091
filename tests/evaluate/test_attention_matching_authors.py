"""The script that measures the authors' Attention Matching: what of it runs without their code."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import attention_matching_authors as script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention_matching_authors.py"


def row(window, nll, **facts):
    figures = {"nll": nll, "nll_dense": 2.0, "kl": 0.1 * window, "top1": 0.5, "seconds": 9.0 - window}
    place = {"method": "AM-OMP", "queries_mode": "repeat", "keep": 0.1, "window": window}
    return {**place, **figures, "slots_per_head": 76.0, "max_abs_value": 3.0, **facts}


def test_summary_is_that_of_the_continuation_protocol():
    (line,) = script.summarise([row(1, 3.0, queries_reused=True), row(0, 2.5)])
    assert line["which_windows"] == [0, 1] and line["predictions"] == 2 * 255
    assert line["delta_ppl"] == pytest.approx(math.exp(2.75) - math.exp(2))  # pooled
    assert line["delta_ppl_windows"] == pytest.approx((math.exp(3) + math.exp(2.5)) / 2 - math.exp(2))
    assert line["kl"] == pytest.approx(0.05) and line["top1"] == 50
    assert line["seconds"] == 9  # not that of the row whose queries were at hand


def test_methods_and_budgets_are_rows_of_their_own():
    rows = [row(0, 2.5), row(0, 2.4, keep=0.2), row(0, 2.4, queries_mode="context-prefill")]
    keys = [(line["queries"], line["keep"]) for line in script.summarise(rows)]
    assert keys == [("context-prefill", 0.1), ("repeat", 0.1), ("repeat", 0.2)]


def test_context_and_repetition_keep_the_windows_tokens():
    """Text that is cut anywhere may be tokenised otherwise when it is read again."""

    class Tokenizer:
        chat_template = "…"

        def decode(self, ids):
            return "cut te"

        def __call__(self, text, **options):
            return SimpleNamespace(input_ids=[ord(letter) for letter in text])

    tokens = script.ExactTokens(Tokenizer(), [7, 8])
    assert tokens("cut te").to("cpu").input_ids.tolist() == [[7, 8]]
    assert tokens("cut te?!cut te").input_ids.tolist() == [[7, 8, ord("?"), ord("!"), 7, 8]]
    assert tokens("other").input_ids == [ord(letter) for letter in "other"]
    assert tokens.chat_template == "…"
    with pytest.raises(ValueError, match="generation server"):
        tokens("cut te and an answer")


def test_summary_writes_a_file_with_a_manifest(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([row(0, 2.5)]))
    (tmp_path / "windows.json").write_text("[]")
    where = ["--windows", str(tmp_path / "windows.json"), "--out", str(tmp_path / "page.json")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "summary", str(tmp_path / "rows.json"), *where])
    script.main()
    page = json.loads((tmp_path / "page.json").read_text())
    assert page["rows"][0]["method"] == "AM-OMP" and "torch" in page["manifest"]["versions"]
    assert script.COMMIT in page["code"] and "wrote" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))
