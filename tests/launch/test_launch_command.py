"""`kvcat launch`: what it hands to the scripts, and what it refuses."""

import os
import shlex
import subprocess
import sys

import pytest
from click.testing import CliRunner

from kvcat_nemo.cli import main


def kvcat(*words, cwd=None):
    code = "from kvcat_nemo.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=60
    )


def test_local_prints_what_would_run(tmp_path):
    done = kvcat(
        "launch",
        "local",
        "kvcat_tiny",
        "--procs-per-node",
        2,
        "--dry-run",
        "trainer.max_steps=3",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("+ KVCAT_RUN_DIR=") and "torchrun.sh" in done.stderr
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[0] == "torchrun" and command[command.index("--nproc-per-node") + 1] == "2"
    nemo = command[command.index("nemo") :]
    assert nemo[:5] == [
        "nemo",
        "llm",
        "pretrain",
        "--factory",
        f"kvcat_tiny(dir='{tmp_path}/runs', name='kvcat_tiny')",
    ]
    assert nemo[5:] == ["-y", "trainer.num_nodes=1", "trainer.devices=2", "trainer.max_steps=3"]
    assert f"KVCAT_RUN_DIR={tmp_path}/runs/kvcat_tiny" in done.stdout.splitlines()
    assert not list(tmp_path.iterdir())


def test_slurm_hands_every_option_on(tmp_path):
    done = kvcat(
        "launch", "slurm", "kvcat_tiny(base='/ckpt/x')", "--run-dir", tmp_path / "r", "--nodes", 8, "--image", "i",
        "--mount", "/ckpt:/ckpt", "--env", "A=1", "--time", "30", "--partition", "p", "--restart-on-failure",
        "--exclude", "n3", "--stop-seconds", 100, "--dry-run", "optim.config.lr=0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    script = done.stdout
    for line in (
        "#SBATCH --nodes=8", "#SBATCH --time=30", "#SBATCH --partition=p", "#SBATCH --exclude=n3", "export A=1",
        "export KVCAT_IMAGE=i", "export KVCAT_STOP_SECONDS=100 KVCAT_EXIT_WAIT=60",
        "export KVCAT_MAX_STALLED=3 KVCAT_RESTART_ON_FAILURE=1",
        r"export KVCAT_HEALTH_COMMAND=kvcat\ train\ doctor\ --dir\ \"\$KVCAT_RUN_DIR\""
        r"\ --disk-gb\ \"\$KVCAT_MIN_DISK_GB\"\ --timeout\ 120",
    ):  # fmt: skip
        assert line in script.splitlines(), line
    (command,) = [line for line in script.splitlines() if line.startswith("KVCAT_COMMAND=(")]
    words = shlex.split(command.removeprefix("KVCAT_COMMAND=(").rstrip(" )"))
    assert words[-3:] == ["trainer.num_nodes=8", "trainer.devices=8", "optim.config.lr=0.1"]


def test_zero_is_a_value(tmp_path):
    done = kvcat(
        "launch", "slurm", "kvcat_tiny", "--gpus-per-node", 0, "--max-stalled", 0, "--dry-run", cwd=tmp_path
    )
    assert (
        "--gpus-per-node" not in done.stdout and "KVCAT_GPUS_PER_NODE=0 KVCAT_PROCS_PER_NODE=1" in done.stdout
    )
    assert "export KVCAT_MAX_STALLED=0 " in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["local", "kvcat tiny"], 'give NAME or "NAME('),
        (["local", "kvcat_tiny(5)"], "values by name"),
        (["local", "kvcat_tiny(base=open('x'))"], "values by name"),
        (["slurm", "kvcat_tiny(dir='/x')"], "dir comes from --run-dir"),
        (["slurm", "kvcat_tiny", "trainer.devices=4"], "trainer.devices=4: comes from"),
        (["k8s", "kvcat_tiny", "--run-dir", "/r/a", "--dry-run"], "image=None"),
    ],
)
def test_refusals(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["launch", *words])
    assert result.exit_code == 1 and message in result.output
    assert not os.listdir(tmp_path)


@pytest.mark.nemo
@pytest.mark.slow
def test_a_misspelt_override_is_refused_before_it_is_submitted(tmp_path):
    done = kvcat("launch", "slurm", "kvcat_tiny", "--run-dir", tmp_path / "r", "trainer.max_stepz=5")
    assert done.returncode == 1 and "did you mean trainer.max_steps" in done.stderr
    assert not list(tmp_path.iterdir())


def test_k8s_writes_a_file(tmp_path):
    out = tmp_path / "job.yaml"
    done = kvcat(
        "launch", "k8s", "kvcat_tiny", "--run-dir", "/runs/tiny", "--image", "i", "--mount", "runs:/runs", "--no-plan",
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0 and f"kubectl apply -f {out}" in done.stderr
    assert "kind: JobSet" in out.read_text()
