"""A launcher is one file: what adding one takes, and what the others share with it."""

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main
from kvcat_nemo.commands import launch, launchers

FILES = ["kvcat_nemo/commands/launchers/toy.py"]
"""What a new launcher's author touches."""
TOY = '''
import click

from kvcat_nemo.commands.launchers.shared import SHARED, check_values, options, run_folder, run_script, training_words


@click.command("toy")
@options(SHARED)
@click.option("--greeting", default="hello", show_default=True, help="A word before the command.")
def command(recipe, overrides, run_dir, nodes, procs_per_node, setup, interface, master_port, max_stalled, greeting):
    """Print RECIPE's command."""
    folder = run_folder(run_dir, recipe)
    check_values({"nodes": nodes, "setup": setup})
    run_script(["echo", greeting, *training_words(recipe, overrides, folder, nodes, procs_per_node or 1)])
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    room = tmp_path / FILES[0]
    room.parent.mkdir(parents=True)
    room.write_text(TOY)
    monkeypatch.setattr(launchers, "__path__", [*launchers.__path__, str(room.parent)])
    monkeypatch.setattr(launch.command, "commands", launchers.launchers())
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.py")] == FILES


def kvcat(*words):
    return CliRunner().invoke(main, ["launch", *map(str, words)])


def test_one_file_adds_a_launcher(toy, tmp_path, capfd):
    listed = kvcat("--help").output
    assert "toy" in listed and "Print RECIPE's command." in listed and "slurm" in listed
    done = kvcat("toy", "kvcat_tiny", "--run-dir", tmp_path / "r", "--nodes", 3, "trainer.max_steps=5")
    assert done.exit_code == 0, done.output
    said = capfd.readouterr().out
    assert (
        said.startswith("hello nemo llm pretrain --factory kvcat_tiny(dir=") and "trainer.num_nodes=3" in said
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kvcat_tiny", "trainer.devices=2"], "trainer.devices=2: comes from --nodes"),
        (["kvcat_tiny(", "--nodes", 1], "give NAME or"),
        (["kvcat_tiny", "--nodes", 10**12], "nodes"),
        (["kvcat_tiny", "optim.config.lr=os.abort"], "os.abort"),
        (["kvcat_tiny", "log.x=hf_0123456789abcdefghij"], "credential"),
    ],
)
def test_a_new_launcher_refuses_what_the_others_refuse(toy, words, message, tmp_path):
    for launcher in ("toy", "local"):
        done = kvcat(launcher, *words, "--run-dir", tmp_path / "r")
        assert done.exit_code != 0 and message in done.output, (launcher, done.output)


def test_every_launcher_takes_the_shared_options():
    from kvcat_nemo.commands.launchers.shared import SHARED, options

    @options(SHARED)
    def bare():
        pass

    shared = {parameter.name for parameter in bare.__click_params__}
    known = launchers.launchers()
    assert list(known) == ["k8s", "local", "slurm"] and len(shared) == 9
    for name, command in known.items():
        assert shared <= {parameter.name for parameter in command.params}, name
