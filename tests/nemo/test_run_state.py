"""The state that a run's callbacks share, the phases in which they act, and a list of callbacks that a user has changed."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.nemo

ROOM = Path(__file__).parents[2] / "kvcat_nemo" / "nemo"


def classes():
    from kvcat_nemo.nemo.checkpoint import KVCatCheckpoint
    from kvcat_nemo.nemo.trainer import CALLBACKS

    return [*CALLBACKS, KVCatCheckpoint]


def own_methods(cls) -> set[str]:
    found = [k for k in cls.__mro__ if k.__module__.startswith("kvcat_nemo")]
    return {name for k in found for name, value in vars(k).items() if callable(value)}


def test_phases_say_who_acts_and_in_which_order():
    """Every hook that a callback of ours has stands in one phase, with exactly those callbacks, in the order of the list."""
    import lightning.pytorch as pl

    from kvcat_nemo.nemo.run_state import PHASES

    hooks = {name for name in vars(pl.Callback) if not name.startswith("_")} | {"on_megatron_step_end"}
    hooks -= {"state_key"}
    said = [(hook, names) for phase in PHASES for hook, names in phase.hooks.items()]
    assert len({hook for hook, _ in said}) == len(said)
    code = {h: tuple(c.__name__ for c in classes() if h in own_methods(c)) for h in hooks}
    assert dict(said) == {hook: names for hook, names in code.items() if names}


def test_no_callback_looks_for_another():
    """Where `trainer.callbacks` is read: to arrange it, to check settings before a start, and to describe the run."""
    readers = set()
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "callbacks":
                readers.add(file.stem)
    assert readers == {"trainer", "strategy", "plan", "records"}


def test_imports_of_the_room_have_no_cycle():
    """Those inside of functions too."""
    edges = {}
    for file in ROOM.glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvcat_nemo.nemo"):
                inner = node.module.split(".")[2:]
                found |= {inner[0]} if inner else {alias.name for alias in node.names}
        edges[file.stem] = found & {f.stem for f in ROOM.glob("*.py")}
    while True:
        leaves = {name for name, needs in edges.items() if not needs}
        if not leaves:
            break
        edges = {name: needs - leaves for name, needs in edges.items() if name not in leaves}
    assert not edges, f"imports in a circle among {sorted(edges)}"


ORDER = ["RandomState", "Metrics", "Progress", "Guard", "Stop", "Heartbeat", "Records"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (ORDER, ORDER),
        ([], [n for n in ORDER if n != "Progress"]),
        (ORDER[::-1], ORDER),
        (["Guard", "Metrics"], [n for n in ORDER if n != "Progress"]),
        (["Foreign", *ORDER], ["Foreign", *ORDER]),
        ([*ORDER, "Foreign"], [*ORDER, "Foreign"]),
        (["Guard", "Foreign", *[n for n in ORDER if n != "Guard"]], [*ORDER, "Foreign"]),
        (["Checkpoint", *ORDER], [*ORDER, "Checkpoint"]),
        (["Foreign", "Checkpoint"], [*[n for n in ORDER if n != "Progress"], "Foreign", "Checkpoint"]),
        ([*ORDER, "Guard"], "KVCatGuard 2 times"),
    ],
)
def test_any_list_of_callbacks_is_completed_and_put_in_order(given, wanted, caplog):
    import lightning.pytorch as pl

    from kvcat_nemo.nemo.run_state import RunState
    from kvcat_nemo.nemo.trainer import start_run

    kinds = {cls.__name__.removeprefix("KVCat"): cls for cls in classes()} | {
        "Foreign": type("KVCatForeign", (pl.Callback,), {})
    }
    made = [kinds[name]() for name in given]
    trainer = SimpleNamespace(callbacks=list(made), run_state=RunState())
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            start_run(trainer)
        return
    start_run(trainer)
    assert [type(c).__name__.removeprefix("KVCat") for c in trainer.callbacks] == wanted
    assert all(c in trainer.callbacks for c in made)  # with the settings that they were given
    shared = [c.run for c in trainer.callbacks if hasattr(c, "bind")]
    assert len(shared) >= 4 and all(state is trainer.run_state for state in shared)


def test_what_is_not_known_yet_is_not_taken_from_the_step_before():
    """A guard that acts before the metrics would judge the gradients of the former step."""
    from kvcat_nemo.nemo.guard import KVCatGuard
    from kvcat_nemo.nemo.run_state import RunState, StepState

    state, guard = RunState(), KVCatGuard()
    with pytest.raises(RuntimeError, match="KVCatGuard belongs to no run.*KVCatTrainer"):
        guard.on_before_optimizer_step(None, None, None)
    guard.bind(state)
    state.step = StepState(figures={"loss/total": 1.0}, norms={"all": 1.0})
    state.step = StepState(figures={"loss/total": 1.0})  # the next step begins
    with pytest.raises(RuntimeError, match="'norms' of this step is not known yet"):
        guard.on_before_optimizer_step(None, None, None)


def test_a_plain_trainer_is_refused():
    from nemo import lightning as nl

    from kvcat_nemo.nemo.trainer import start_run

    with pytest.raises(TypeError, match=r"needs kvcat_nemo.nemo.trainer.KVCatTrainer"):
        start_run(nl.Trainer(max_steps=1, accelerator="cpu", logger=False))


def test_counters_travel_in_checkpoints_under_the_names_that_old_runs_have():
    from kvcat_nemo.nemo.run_state import RunCallback, RunState

    stored = {"KVCatMetrics": {"consumed_tokens": 7}, "KVCatGuard": {"skipped_steps": 3, "in_a_row": 2}}
    state = RunState()
    for cls in classes():
        one = cls()
        if not isinstance(one, RunCallback):
            continue
        one.bind(state)
        if one.state_key in stored:
            one.load_state_dict(stored[one.state_key])
            assert one.state_dict() == stored.pop(one.state_key)
    assert not stored
    assert (state.consumed_tokens, state.skipped_steps, state.skipped_in_a_row) == (7, 3, 2)
