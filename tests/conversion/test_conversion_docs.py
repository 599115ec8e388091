"""Commands and Python in docs/conversion.md and in the help texts are ones that exist."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from kvcat_nemo.cli import main

_DOC = Path(__file__).parents[2] / "docs" / "conversion.md"


def _blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", _DOC.read_text(), re.M | re.S)


def _resolve(words):
    """The command that the words call, and what is left of them."""
    command = main
    while isinstance(command, click.Group):
        command, words = command.get_command(click.Context(command), words[0]), words[1:]
    return command, words


def _documented():
    lines = [line for block in _blocks("sh") for line in block.splitlines()]
    for words in (["convert", "import"], ["convert", "export"], ["convert", "verify"], ["export"]):
        lines += re.findall(r"^\s*(kvcat .*)$", _resolve(words)[0].help, re.M)
    return lines


@pytest.mark.parametrize("line", _documented())
def test_documented_command_parses(line, tmp_path, monkeypatch):
    words = shlex.split(line)
    assert words[0] == "kvcat"
    command, rest = _resolve(words[1:])
    monkeypatch.chdir(tmp_path)
    for word in rest:
        if "/" in word:
            Path(word).mkdir(parents=True, exist_ok=True)
    command.make_context("x", rest)  # raises for an unknown option or a wrong number of arguments


def test_there_are_commands_to_check():
    assert len(_documented()) >= 12


def test_documented_python_names_exist():
    from importlib import import_module

    for node in ast.walk(ast.parse("\n".join(_blocks("python")))):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(import_module(node.module), alias.name) for alias in node.names)
