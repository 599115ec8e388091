"""Adding a compressor touches these files, and no other:

1. compress/NAME.py: a dataclass of its settings with a name and `compress_row`; its docstring's first line is its help.
2. compress/registry.py: an import and a line in _ALL. The matrix in tests/compress/test_all.py tests it from then on.
3. docs/compress.md: its row in the table (tests/test_docs.py asks for one).

`QUICK` in test_all.py may give cheaper settings. Command lines, sweeps, cache files and reports need no change.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import ClassVar

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.compress import COMPRESSORS, Budget, KVCache, compress, make, select
from kvcat_nemo.compress.compressor import Compressor
from kvcat_nemo.compress.prefill import Prefilled
from tests.compress import test_all
from tests.support.hf_models import small_model, tokens


@dataclass
class Longest(Compressor):
    """The slots whose values are the longest."""

    name: ClassVar[str] = "longest"
    power: float = 1.0
    """Of the length, which changes no order."""

    def compress_row(self, prefilled: Prefilled, slots: int) -> KVCache:
        scores = [layer.values_BGSE.norm(dim=-1) ** self.power for layer in prefilled.cache.layers]
        return select(prefilled, scores, slots)


@pytest.fixture(autouse=True)
def longest(monkeypatch):
    monkeypatch.setitem(COMPRESSORS, "longest", Longest)  # the line in registry.py


def test_it_is_made_stacked_and_started_from_by_its_name():
    assert make("longest") == Longest() and make("longest:power=2").power == 2.0
    assert str(make("longest:power=2+int8")) == "longest:power=2.0+int8"
    assert make("gradient:init=longest").smallest == 1
    with pytest.raises(ValueError, match="longest has power=…"):
        make("longest:pwer=2")


def test_it_is_listed_with_its_settings():
    done = CliRunner().invoke(main, ["compress", "--list"])
    assert "longest\n    The slots whose values are the longest.\n    settings: power=1.0" in done.output


def test_its_caches_are_kept(tmp_path):
    done = compress(small_model(), [tokens(30)], make("longest+int4"), Budget(keep_fraction=0.5))
    done.cache.save(tmp_path / "cache")
    again = KVCache.load(tmp_path / "cache")
    assert again.facts["compressor"] == "longest+int4" and again.slots == 15


def matrix():
    """The tests of test_all that take a compressor's name, with the other arguments they take."""
    marks = {
        name: {
            word: values
            for mark in getattr(function, "pytestmark", [])
            if mark.name == "parametrize"
            for word, values in [(mark.args[0], mark.args[1])]
        }
        for name, function in vars(test_all).items()
        if name.startswith("test_")
    }
    return {name: words for name, words in marks.items() if "name" in words and "random" in words["name"]}


@pytest.mark.parametrize("test", matrix())
def test_the_matrix_holds_for_it_too(test, request):
    words = matrix()[test]
    arguments = {word: values[0] for word, values in words.items()} | {"name": "longest"}
    function = getattr(test_all, test)
    for fixture in inspect.signature(function).parameters.keys() - arguments.keys():
        arguments[fixture] = request.getfixturevalue(fixture)
    function(**arguments)


def test_the_matrix_is_one():
    assert len(matrix()) >= 5
