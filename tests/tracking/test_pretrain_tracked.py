"""`nemo llm pretrain` against a real server that dies and comes back, with credentials around."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from kvcat_nemo.runs.metrics_file import MetricsFile
from kvcat_nemo.tracking.mlflow_run import client_of

pytestmark = [pytest.mark.nemo, pytest.mark.slow]

BIN = Path(sys.executable).parent
STEPS = 60
SECRETS = {
    "HF_TOKEN": "hf_0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-0123",
    "MY_API_KEY": "key-0123456789",
}
PASSWORD = "s3cret-word"

# Every connection that Python makes in the job's processes.
LISTEN = """
import os, sys
def hook(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        with open(os.environ["CONNECTIONS"], "a") as file:
            file.write(f"{arguments[1][0]}\\n")
sys.addaudithook(hook)
"""


@pytest.fixture(scope="module")
def tracked(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "hook").mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(LISTEN)
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DO_NOT_TRACK", "PYTEST_", "CI"))
    }
    environment |= SECRETS | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "NEMORUN_HOME": str(folder / ".nemo_run"),
        "PYTHONPATH": str(folder / "hook"),
        "CONNECTIONS": str(folder / "connections.txt"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "MLFLOW_TRACKING_URI": server.url.replace("http://", f"http://ann:{PASSWORD}@"),
        "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
    }
    command = [
        str(BIN / "nemo"),
        "llm",
        "pretrain",
        "--factory",
        f"kvcat_tiny(dir='{folder / 'runs'}', name='tiny')",
        "-y",
    ]
    command += [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS // 2}"]
    command += [f"log.ckpt.every_n_train_steps={STEPS}"]
    output = folder / "output.txt"
    with output.open("w") as log:
        job = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    run = folder / "runs" / "tiny"

    def at_step(step):
        deadline = time.monotonic() + 240
        while not any(
            x["kind"] == "train" and x["step"] >= step
            for x in MetricsFile.read(run / "kvcat" / "metrics.jsonl")
        ):
            assert job.poll() is None and time.monotonic() < deadline, output.read_text()[-4000:]
            time.sleep(0.02)

    try:
        at_step(5)
        server.kill()
        at_step(20)  # it goes on
        os.killpg(job.pid, signal.SIGSTOP)  # or it would be at its end before the server is back
        server.start()
        os.killpg(job.pid, signal.SIGCONT)
        code = job.wait(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert code == 0, output.read_text()[-4000:]
    client = client_of(server.url)
    run_id = json.loads((run / "kvcat" / "mlflow_run.json").read_text())["run_id"]
    return folder, client, client.get_run(run_id)


def test_every_step_once(tracked):
    folder, client, run = tracked
    assert run.info.status == "FINISHED"
    names = [n for n in run.data.metrics if n.startswith("train/")]
    assert {
        "train/loss/anchor",
        "train/loss/distill",
        "train/loss/budget",
        "train/keep_rate/group0",
        "train/keep_rate/group1",
        "train/tokens_per_second",
        "train/tflops_per_gpu",
        "train/peak_memory_bytes",
    } <= set(names)
    for name in names:
        steps = [m.step for m in client.get_metric_history(run.info.run_id, name)]
        first = 2 if "flipped" in name else 1  # it compares with the step before
        assert steps == list(range(first, STEPS + 1)), name
    held = client.get_metric_history(run.info.run_id, "validation/dense_ppl")
    assert [m.step for m in held] == [0, STEPS // 2, STEPS]
    assert "system/cpu_utilization_percentage" in run.data.metrics
    kin = client.search_runs([run.info.experiment_id], "attributes.run_name = 'tiny'")
    assert len(kin) == 1


def test_throughput_counts_both_passes(tracked):
    """6 FLOPs per weight and token, twice, by hand for kvcat_tiny's shape."""
    folder, client, run = tracked
    width, ffn, layers, vocab, tokens = 64, 176, 4, 128, 4 * 64
    attention = width * (64 + 2 * 32) + 64 * width + 64 + 2 * 32
    routers = 2 * (width * width + 4 * width * 16 + 2 * width + 1)
    weights = layers * (attention + 3 * width * ffn + 2 * width) + vocab * width + width + routers
    flops = 2 * tokens * (6 * weights + 6 * layers * 64 * 4 * 16)
    for line in MetricsFile.read(folder / "runs" / "tiny" / "kvcat" / "metrics.jsonl"):
        if line["kind"] == "train":
            assert line["tflops_per_gpu"] == pytest.approx(flops / line["step_seconds"] / 1e12, rel=1e-6)


def test_the_whole_recipe_and_its_files(tracked):
    folder, client, run = tracked
    params = run.data.params
    for name, value in {
        "model.kvcat.policy": "router",
        "model.kvcat.router_lr_mult": "1.0",
        "model.num_layers": "4",
        "optimizer.lr": "0.002",
        "schedule.warmup_steps": "4",
        "data.seq_length": "64",
        "trainer.max_steps": str(STEPS),
        "strategy.tensor_model_parallel_size": "1",
        "checkpoints.every_n_train_steps": str(STEPS),
    }.items():
        assert params.get(name) == value, (name, params.get(name))
    kept = folder / "runs" / "tiny" / "kvcat"
    described = yaml.safe_load((kept / "config.yaml").read_text())
    assert described == json.loads((kept / "config.json").read_text())
    assert described["model"]["kvcat"]["policy"] == "router"
    assert {"torch", "megatron-core"} <= json.loads((kept / "manifest.json").read_text())["versions"].keys()
    attached = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert attached == {"config.yaml", "config.json", "manifest.json", "metrics.jsonl", "losses.png"}


def test_one_warning(tracked):
    output = (tracked[0] / "output.txt").read_text()
    assert output.count("MLflow (http://127.0.0.1") - output.count("answers again") == 1, output[-3000:]


def test_credentials_are_nowhere(tracked, server):
    folder = tracked[0]
    secrets = [s.encode() for s in (*SECRETS.values(), PASSWORD)]
    looked = 0
    for root in (folder, server.folder):
        for path in root.rglob("*"):
            if path.is_file():
                looked += 1
                data = path.read_bytes()
                assert not any(secret in data for secret in secrets), path
    assert looked > 20


def test_nothing_left_the_machine(tracked):
    file = tracked[0] / "connections.txt"
    assert set(file.read_text().split()) <= {"127.0.0.1", "::1"}
