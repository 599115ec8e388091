"""Classes that checkpoints' context/ and NeMo-Run's experiments hold by name are found, whatever version wrote them."""

import importlib
import json
import pickle
from pathlib import Path

import pytest

from kvcat_nemo.nemo.old_names import RENAMED

pytestmark = pytest.mark.nemo

STORED = json.loads(Path(__file__).with_name("stored_names.json").read_text())
"""module:class of all recipes and of a run's checkpoint (io.json, model.yaml, pickles), of commit 8998b36 and of every later
version. A line stays for ever; a class that moves adds one, and one to nemo/old_names.py."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("stored", STORED)
def test_a_stored_name_is_found(stored):
    module, name = stored.split(":")
    found = getattr(importlib.import_module(module), name)
    assert found.__name__ == RENAMED.get(name, name)
    assert found is getattr(importlib.import_module(found.__module__), found.__name__)
    assert pickle.loads(f"c{module}\n{name}\n.".encode()) is found


def test_what_this_version_stores_is_in_the_list():
    import fiddle as fdl

    from kvcat_nemo.recipes import RECIPES

    found = set()

    def walk(value):
        if isinstance(value, fdl.Buildable):
            target = fdl.get_callable(value)
            found.add(f"{target.__module__}:{target.__qualname__}")
            walk(list(fdl.ordered_arguments(value).values()))
        elif isinstance(value, list | tuple):
            for one in value:
                walk(one)

    walk([make() for make in RECIPES.values()])
    ours = {name for name in found if name.startswith("kvcat_nemo")}
    assert len(ours) > 20 and ours <= set(STORED), sorted(ours - set(STORED))


def test_an_old_module_says_what_it_is_now_and_an_unknown_one_does_not_exist(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "kvcat_nemo.nemo.verify", raising=False)
    with pytest.warns(
        DeprecationWarning, match=r"kvcat_nemo\.nemo\.verify is kvcat_nemo\.nemo\.checkpoint_check now"
    ):
        importlib.import_module("kvcat_nemo.nemo.verify")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("kvcat_nemo.nemo.of_yore")
    stop = importlib.import_module("kvcat_nemo.nemo.stop")
    with pytest.raises(AttributeError, match="no attribute 'KVCatOfYore'"):
        stop.KVCatOfYore  # noqa: B018
