"""What README and docs say exists: commands, recipes, settings, files."""

import ast
import dataclasses
import re
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest

from kvcat_nemo.cli import main
from kvcat_nemo.method.config import KVCatConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            "tracking",
            "recipes",
            "method",
            "parallelism",
            "faults",
            "compress",
            "evaluation",
            "serving",
        )
    ),
]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def shell_lines():
    text = "".join(block for page in PAGES for block in blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words for words in lines if words]


def test_there_are_commands_to_check():
    assert len(shell_lines()) >= 12


@pytest.mark.parametrize("words", [w for w in shell_lines() if w[0] == "kvcat"], ids=" ".join)
def test_kvcat_commands_parse(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in words:  # arguments that must exist
        path = tmp_path / word.rpartition("=")[2].lstrip("/")
        if path.suffix in (".txt", ".safetensors", ".kv"):
            path.touch()
        elif "/" in word and path.suffix != ".html":
            path.mkdir(parents=True, exist_ok=True)
    command, rest = main, [w.lstrip("/") for w in words[1:]]
    while isinstance(command, click.Group):
        _, command, rest = command.resolve_command(click.Context(command), rest)
    try:
        command.make_context(command.name, list(rest))
    except click.exceptions.Exit as done:  # --list
        assert done.exit_code == 0


@pytest.mark.parametrize("words", [w for w in shell_lines() if w[0] == "make"], ids=" ".join)
def test_make_targets_exist(words):
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.nemo
@pytest.mark.parametrize(
    "words", [w for w in shell_lines() if w[:3] == ["nemo", "llm", "pretrain"]], ids=" ".join
)
def test_nemo_commands_name_recipes_and_fields(words):
    from kvcat_nemo.recipes import RECIPES
    from kvcat_nemo.recipes.overrides import check_overrides

    if "--help" in words:
        return
    factory = words[words.index("--factory") + 1]
    call = ast.parse(factory, mode="eval").body
    name, arguments = (call.id, {}) if isinstance(call, ast.Name) else (call.func.id, call.keywords)
    keywords = {k.arg: ast.literal_eval(k.value) for k in arguments} if arguments else {}
    check_overrides(RECIPES[name](**keywords), words)


@pytest.mark.nemo
def test_all_recipes_and_no_others_are_documented():
    from kvcat_nemo.recipes import RECIPES

    for page in (PAGES[0], ROOT / "docs" / "recipes.md"):
        named = set(re.findall(r"`(kvcat_(?!nemo|base)[a-z0-9_]+)`", page.read_text(encoding="utf-8")))
        assert named == set(RECIPES), page


def test_settings_table_is_the_configuration():
    table = re.findall(
        r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+) \|",
        (ROOT / "docs" / "method.md").read_text(encoding="utf-8"),
        re.M,
    )
    documented = {}
    for names, defaults in table:
        names, values = re.findall(r"`(\w+)`", names), [v.strip() for v in defaults.split(",")]
        if len(names) == len(values):
            documented |= dict(zip(names, values, strict=True))
    actual = {f.name: f.default for f in dataclasses.fields(KVCatConfig)}
    for name in KVCatConfig.__dataclass_fields__:
        assert name in documented, f"docs/method.md does not list {name}"
        assert documented[name] in (
            str(actual[name]),
            f"{actual[name]:g}" if isinstance(actual[name], float) else "",
            str(actual[name]).lower(),
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_import_what_exists(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and not node.module.startswith("kvcat_nemo.recipes"):
                assert all(hasattr(import_module(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_protocol_has_its_row():
    from kvcat_nemo.evaluate.registry import PROTOCOLS

    named = re.findall(
        r"^\| `kvcat evaluate ([\w-]+)` \|",
        (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert sorted(named) == sorted([*PROTOCOLS, "sweep"])


def test_every_compressor_has_its_row():
    from kvcat_nemo.compress.kvpress_adapter import PRESSES
    from kvcat_nemo.compress.registry import COMPRESSORS

    table = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "compress.md").read_text(encoding="utf-8"), re.M)
    assert sorted(re.findall(r"`([^`]+)`", " ".join(table))) == sorted([*COMPRESSORS, *PRESSES])


def test_exit_codes_are_documented():
    from kvcat_nemo.runs import exit_codes

    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    codes = set(re.findall(r"\| (?:the others )?(\d+)\b[^|]*\|$", text, re.M))
    assert {str(exit_codes.REQUEUE), str(exit_codes.PEER_DIED), "1"} <= codes
