"""Where the example folder is not: an installed package says what to do, and touches nothing."""

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.data import assets

HINT = "a clone of kvcat-nemo has and an installed package has not"


@pytest.mark.parametrize(
    "words",
    [
        ["model", "list"],
        ["model", "fetch", "smollm2-135m"],
        ["data", "fetch", "qasper", "q.jsonl"],
        ["data", "fetch", "piqa", "p.jsonl"],
        ["data", "windows", "--tokenizer", "x", "--out", "w.json"],
    ],
    ids=" ".join,
)
def test_without_the_example_folder(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "FOLDER", tmp_path / "examples" / "registry_assets")
    done = CliRunner().invoke(main, words)
    assert (
        done.exit_code == 1 and HINT in done.output and "give a hub id or a local file instead" in done.output
    )
    assert list(tmp_path.iterdir()) == []


def test_the_clones_folder_is_found():
    assert "qasper" in assets.registry_assets("corpora").CORPORA
