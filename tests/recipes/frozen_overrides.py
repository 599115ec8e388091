"""Every override of every recipe with its default, as text: `path = value`, first what all recipes share, then each recipe's own.

    python tests/recipes/frozen_overrides.py        writes tests/recipes/overrides.txt anew

A field of ours that is renamed, a default that changes, and what a new NeMo or Megatron-core brings show up in its diff.
"""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path

FILE = Path(__file__).with_name("overrides.txt")
HEAD = "# Made by: python tests/recipes/frozen_overrides.py\n"


def overrides_of(config, path: str = "") -> dict[str, str]:
    """`path` → default of everything that can be set in a recipe."""
    import fiddle as fdl

    from kvcat_nemo.recipes.overrides import settable

    given = fdl.ordered_arguments(config)
    values = settable(fdl.get_callable(config)) | given
    out: dict[str, str] = {}
    for name, value in values.items():
        here = f"{path}.{name}" if path else name
        if isinstance(value, fdl.Buildable):
            out[here] = _name(fdl.get_callable(value))
            out |= overrides_of(value, here)
        elif isinstance(value, list) and any(isinstance(one, fdl.Buildable) for one in value):
            for place, one in enumerate(value):
                out[f"{here}[{place}]"] = _name(fdl.get_callable(one))
                out |= overrides_of(one, f"{here}[{place}]")
        else:
            out[here] = _text(value)
    return out


def _name(value) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _text(value) -> str:
    if value is inspect.Parameter.empty:
        return "(to be given)"
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if inspect.isclass(value) or inspect.isroutine(value):
        return _name(value)
    text = repr(value)
    return text if " at 0x" not in text else f"a {_name(type(value))}"


def render() -> str:
    """The file's text."""
    from kvcat_nemo.recipes import RECIPES

    found = {name: overrides_of(make()) for name, make in RECIPES.items()}
    first = next(iter(found.values()))
    shared = {path: v for path, v in first.items() if all(one.get(path) == v for one in found.values())}
    parts = {"every recipe": shared} | {
        name: {path: v for path, v in one.items() if path not in shared} for name, one in found.items()
    }
    sections = [
        "\n".join([f"[{name}]", *(f"{path} = {lines[path]}" for path in sorted(lines))])
        for name, lines in parts.items()
    ]
    return HEAD + "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
    print(f"{FILE}: {len(FILE.read_text().splitlines())} lines")
