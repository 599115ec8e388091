"""The README's commands, run one after another as they stand there, on a tiny model and a made-up text.

Their folders are made under a temporary one; an absolute path is looked for there too. What is not run here costs half a minute or
needs a network, and is run elsewhere.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("megatron.core")

from kvcat_nemo.cli import main  # noqa: E402

README = Path(__file__).parents[1] / "README.md"
ELSEWHERE = {
    "make": "tests/test_quickstart.py, and this run",
    ".": "tests/launch",
    "pip": "make setup",
    "nemo llm pretrain": "tests/nemo/test_pretrain.py; parsed by tests/test_docs.py",
    "kvcat convert verify": "tests/conversion/test_verify.py: it starts processes",
    "kvcat train plan": "tests/nemo/test_recipes.py: it imports NeMo",
    "kvcat export": "tests/nemo/test_pretrain.py: it needs a trained run",
    "kvcat serve": "tests/serve: it starts a server",
}
"""Beginnings of commands that are not run here: where they are."""
SMALLER = {"kvcat evaluate continuation": ["--windows", "windows.json"]}
"""What is added, so that no corpus is fetched; the rest is as it stands."""
MODELS = re.compile(r"(?:[\w.-]+=)?(\S*(?:smollm2-135m|Qwen2\.5-0\.5B|quickstart/model))$", re.I)


def commands() -> list[list[str]]:
    """Words of every line of the README's sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def elsewhere(words: list[str]) -> bool:
    return any(words[: len(start.split())] == start.split() for start in ELSEWHERE)


def here(word: str) -> str:
    """An absolute path under the working folder instead."""
    return re.sub(r"^(\w+=)?/", r"\1", word)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the models, the text and the corpus that the commands name."""
    from tests.support.hf_models import save_model, small_model

    root = tmp_path_factory.mktemp("readme")
    sentence = "The authors measure what a cache of keys and values must hold, and conclude that it is less. "
    (root / "paper.txt").write_text(sentence * 18)
    (root / "corpus").mkdir()
    numbered = [f"Document {number}: {sentence}" for number in range(60)]
    window = {"source": "made up", "doc": "one", "start": 0, "ids": [i * i % 251 + 4 for i in range(1024)]}
    (root / "windows.json").write_text(json.dumps([window]))
    (root / "corpus" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in numbered))
    for words in commands():
        for word in words:
            if (named := MODELS.match(here(word))) and "ckpt" not in word:
                folder = root / named[1]
                if not folder.exists():
                    save_model(folder, max_position_embeddings=2048)
                    if "qwen" in folder.name.lower():
                        small_model("qwen2", vocab_size=260, max_position_embeddings=2048).save_pretrained(
                            folder
                        )
    return root


RUN = [words for words in commands() if not elsewhere(words)]


def test_every_command_is_run_here_or_elsewhere():
    assert len(RUN) >= 6
    assert {tuple(words[:2]) for words in RUN} >= {
        ("kvcat", "compress"),
        ("kvcat", "generate"),
        ("kvcat", "report"),
    }
    for words in commands():
        assert words[0] == "kvcat" or elsewhere(words), words


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_it_runs_as_it_stands(place, words, monkeypatch):
    monkeypatch.chdir(place)
    more = next((add for start, add in SMALLER.items() if words[: len(start.split())] == start.split()), [])
    arguments = [here(word) for word in words[1:]] + more
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    if "--out" in arguments:
        assert Path(arguments[arguments.index("--out") + 1]).exists()
