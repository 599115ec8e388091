"""Adding a protocol touches these files, and no other:

1. evaluate/settings.py: its settings, each declared once; its docstring is the command's help.
2. evaluate/NAME.py: the protocol: its contexts (or windows), how an item is measured, and a row's figures.
3. evaluate/registry.py: a line in PROTOCOLS.
4. docs/evaluation.md: its row in the table (tests/test_docs.py asks for one).

The command and its help, sweeps, checks, resuming, plans and reports follow; a section of its own in the report is a line
in report/page.py, without which it gets a table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.compress import next_logits
from kvcat_nemo.evaluate.options import option
from kvcat_nemo.evaluate.question_protocol import Ask, Context, QuestionProtocol
from kvcat_nemo.evaluate.registry import PROTOCOLS
from kvcat_nemo.evaluate.settings import QuestionSettings
from kvcat_nemo.evaluate.statistics import mean


@dataclass(kw_only=True)
class EchoSettings(QuestionSettings):
    """Whether the last token of a context comes again, for every MODEL."""

    name: ClassVar[str] = "echo"
    about: ClassVar[str] = "the last token once more"
    shown: ClassVar[tuple[str, ...]] = ("share",)

    length: int = option(30, "Tokens of a context.", least=2)
    letters: str = option("few", "How many letters there are.", choices=("few", "many"))


@dataclass(kw_only=True)
class Echo(EchoSettings, QuestionProtocol):
    """The toy."""

    def check_own(self) -> list[str]:
        return [f"letters      {self.letters}"]

    def contexts(self, tokenizer, context: int | None) -> list[Context]:
        step = {"few": 2, "many": 7}[self.letters]
        texts = [[4 + (n + step * i) % 97 for i in range(self.length)] for n in range(self.limit or 3)]
        return [Context(str(n), ids, (Ask("q", ids[-1:], {}),)) for n, ids in enumerate(texts)]

    def own_settings(self) -> dict[str, Any]:
        return self.settings("length", "letters")

    def data_facts(self) -> dict[str, Any]:
        return {}

    def measure(self, model, tokenizer, cache, ask: Ask) -> dict[str, Any]:
        logits = next_logits(model, cache, cache.lengths_B.new_tensor([ask.prompt]))[0, -1]
        return {"again": bool(logits.argmax() == ask.prompt[-1])}

    def figures(self, items: list[dict], asked: list[Ask]) -> dict[str, Any]:
        return {"share": mean([float(item["again"]) for item in items])}


@pytest.fixture(autouse=True)
def echo(monkeypatch):
    module = ModuleType("kvcat_nemo.evaluate.echo")
    module.Echo = Echo
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(PROTOCOLS, "echo", (EchoSettings, "echo:Echo"))  # the line in registry.py


def kvcat(*words):
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


def test_it_has_a_command_with_help_and_ranges(model_dir, tmp_path):
    assert "the last token once more" in kvcat("--help").output
    page = " ".join(kvcat("echo", "--help").output.split())
    for words in (
        "for every MODEL",
        "--length INTEGER Tokens of a context. [default: 30]",
        "[few|many]",
        "--keep",
    ):
        assert words in page, words
    assert "--batch-size" not in page
    for words, message in (
        (("--length", 1), "length=1: give at least 2"),
        (("--length", 10**30), "at most"),
        (("--letters", "all"), "'few', 'many'"),
        (("--length", 600), "the model reads 512"),
        (("--keep", "0.001"), "keeps nothing"),
    ):
        done = kvcat("echo", model_dir, "--out", tmp_path / "out", *words)
        assert done.exit_code != 0 and message in " ".join(done.output.split()), done.output
    assert not (tmp_path / "out").exists()


def test_it_runs_goes_on_and_is_reported(model_dir, tmp_path):
    words = (
        "echo",
        f"m={model_dir}",
        "--compressors",
        "random,recent+int8",
        "--keep",
        0.5,
        "--out",
        tmp_path / "a",
    )
    plan = kvcat(*words, "--dry-run")
    assert plan.exit_code == 0 and "3 questions × 3 caches × 1 models" in plan.output
    done = kvcat(*words)
    assert done.exit_code == 0 and "share" in done.output
    rows = json.loads((tmp_path / "a/results.json").read_text())["rows"]
    assert [(r["compressor"], r["items"], r["slots"]) for r in rows] == [
        ("none", 3, 30), ("random", 3, 15), ("recent+int8", 3, 15),
    ]  # fmt: skip
    before = {p: p.read_bytes() for p in (tmp_path / "a/items").iterdir()}
    assert kvcat(*words).exit_code == 0
    assert {p: p.read_bytes() for p in (tmp_path / "a/items").iterdir()} == before
    page = CliRunner().invoke(main, ["report", str(tmp_path / "a"), "--out", str(tmp_path / "page.html")])
    assert page.exit_code == 0 and "## Echo" in (tmp_path / "page.md").read_text()


def test_it_goes_into_a_sweep(model_dir, tmp_path):
    runs = (
        "[{protocol: echo, length: 9, compressors: recent, keep: 3t}, {protocol: echo, name: b, length: 1}]"
    )
    (tmp_path / "sweep.yaml").write_text(
        f"out: {tmp_path}/s\nshared: {{models: m={model_dir}}}\nruns: {runs}\n"
    )
    done = kvcat("sweep", tmp_path / "sweep.yaml")
    assert done.exit_code == 1 and "length=1: give at least 2" in done.output
    done = kvcat("sweep", tmp_path / "sweep.yaml", "--only", "echo")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "s/echo/results.json").read_text())["rows"][1]["slots"] == 3
