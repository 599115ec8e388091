"""The command line: help everywhere, quickly, and errors without a traceback."""

import resource
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import _COMMANDS, main


def all_commands():
    """Every command and sub-command, as tuples of words."""
    yield ()
    for name in _COMMANDS:
        yield (name,)
        command = main.get_command(click.Context(main), name)
        if isinstance(command, click.Group):
            yield from ((name, sub) for sub in command.list_commands(click.Context(command)))


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_help(words):
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage: ") and len(result.output.splitlines()) > 5


@pytest.mark.parametrize("words", [(), *((name,) for name in _COMMANDS)], ids=" ".join)
def test_help_loads_no_torch_and_takes_less_than_a_second(words):
    code = (
        "import sys\n"
        "from kvcat_nemo.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'megatron', 'nemo', 'transformers'} & sys.modules.keys()\n"
    )

    def cpu():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def run():
        started = cpu()
        done = subprocess.run([sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return cpu() - started

    # Processor time, and the best of three: other work on the machine must not fail this.
    assert min(run() for _ in range(3)) < 1.0


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0 and "0.1.0" in result.output


def test_an_unknown_command_is_refused():
    result = CliRunner().invoke(main, ["dta"])
    assert result.exit_code == 2 and "No such command" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "build", "nowhere/*.jsonl", "--tokenizer", "x", "--out", "y"], "matches no file"),
        (
            ["data", "build", "{corpus}", "--tokenizer", "nowhere", "--out", "y"],
            "tokenizer 'nowhere': no such folder",
        ),
        (["data", "fetch", "web", "a.jsonl"], "no corpus 'web'; known: qasper"),
        (["data", "inspect", "nowhere/train"], "are not both there"),
        (["model", "fetch", "gpt-9"], "no base model 'gpt-9'; known: smollm2-135m"),
    ],
)
def test_errors_are_one_message(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.txt").write_text("text")
    result = CliRunner().invoke(main, [word.format(corpus="corpus.txt") for word in words])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]


def test_the_base_models_are_listed():
    result = CliRunner().invoke(main, ["model", "list"])
    assert result.exit_code == 0 and "smollm2-135m" in result.output and "Apache-2.0" in result.output


def documented_commands():
    """The `kvcat …` lines of docs/data.md."""
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    kvcat ")]
    assert len(lines) >= 5
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("words", documented_commands(), ids=" ".join)
def test_documented_commands_parse(words):
    command = main
    while isinstance(command, click.Group):
        _, command, words = command.resolve_command(click.Context(command), words)
    command.make_context(command.name, list(words))
