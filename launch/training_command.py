"""The command that every launcher starts on its ranks: `nemo llm pretrain` for a recipe in a run's folder."""

from __future__ import annotations

import ast
from pathlib import Path

from kvcat_nemo.common.redact import refuse_credentials
from kvcat_nemo.launch.overrides import factory_call, read_override, touches

_FROM_OPTIONS = ("trainer.devices", "trainer.num_nodes", "log.log_dir", "log.name")


def training_command(
    recipe: str, overrides: tuple[str, ...], run_dir: Path, nodes: int, procs: int
) -> list[str]:
    """`nemo llm pretrain …` for a recipe in a run folder, on `nodes` × `procs` ranks.

    Raises:
        ValueError: when the recipe is not a name or a call with plain values, an override is not a plain value
            (kvcat_nemo.launch.overrides), an argument or override contradicts an option, or one holds credentials.
    """
    # The command is printed, and kept in files; so no message below shows a credential.
    refuse_credentials([recipe, *overrides])
    name, arguments = _read_recipe(recipe)
    for key in ("dir", "name"):
        if key in arguments:
            raise ValueError(f"recipe {recipe!r}: {key} comes from --run-dir; leave it out")
    arguments |= {"dir": str(run_dir.parent), "name": run_dir.name}
    for override in overrides:
        _check_override(override)
    layout = [f"trainer.num_nodes={nodes}", f"trainer.devices={procs}"]
    factory = factory_call(name, arguments)
    return ["nemo", "llm", "pretrain", "--factory", factory, "-y", *layout, *overrides]


def _read_recipe(recipe: str) -> tuple[str, dict]:
    try:
        call = ast.parse(recipe.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if call.args or any(k.arg is None for k in call.keywords):
            raise AttributeError
        return call.func.id, {k.arg: _literal(k.value) for k in call.keywords}
    except (SyntaxError, AttributeError) as error:
        raise ValueError(
            f"recipe {recipe!r}: give NAME or \"NAME(base='…', paths='…')\", values by name"
        ) from error


def _literal(node: ast.expr):
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise AttributeError from None  # a call, or a name


def _check_override(override: str) -> None:
    key = read_override(override).key
    for field in _FROM_OPTIONS:
        if touches(key, field):
            what = "" if key == field else f" (it sets {field})"
            raise ValueError(
                f"{override}: comes from --nodes, --procs-per-node and --run-dir; leave it out{what}"
            )
    if key.startswith("run"):
        raise ValueError(
            f"{override}: kvcat launch starts the ranks itself; run.… is for `nemo llm pretrain`"
        )
