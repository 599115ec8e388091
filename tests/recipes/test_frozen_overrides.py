"""What can be set in a recipe, and its default, changes in the sight of a reviewer: tests/recipes/overrides.txt."""

import difflib

import pytest

from tests.recipes import frozen_overrides

pytestmark = pytest.mark.nemo


def test_overrides_and_their_defaults_are_the_frozen_ones():
    want, found = frozen_overrides.FILE.read_text(encoding="utf-8"), frozen_overrides.render()
    diff = difflib.unified_diff(want.splitlines(), found.splitlines(), "frozen", "now", lineterm="", n=0)
    assert want == found, "\n".join(
        [*diff, "If this is meant: python tests/recipes/frozen_overrides.py, and commit the diff"]
    )


def test_every_frozen_path_can_be_set_and_a_misspelt_one_cannot():
    from kvcat_nemo.recipes import RECIPES
    from kvcat_nemo.recipes.overrides import check_overrides

    recipe = RECIPES["kvcat_tiny"]()
    paths = frozen_overrides.overrides_of(recipe)
    assert len(paths) > 400 and "model.config.kvcat.policy" in paths
    check_overrides(recipe, [f"{path}=1" for path in paths])
    for path in ("model.config.kvcat.polices", "trainer.callbacks[1].warn_afterwards", "optim.config.lrs"):
        with pytest.raises(ValueError, match="has no field"):
            check_overrides(recipe, [f"{path}=1"])
