"""One MLflow run per training, against a real store (a SQLite file)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from kvcat_nemo.runs.layout import RUN_FILE
from kvcat_nemo.runs.metrics_file import MetricsFile
from kvcat_nemo.tracking.afterwards import bring, register_model
from kvcat_nemo.tracking.mlflow_run import CHANGED_TAG, MlflowRun, client_of, figures_of, store_uri
from kvcat_nemo.tracking.outbox import Figure, Outbox
from kvcat_nemo.tracking.system import PREFIX, SystemSampler


def line(step, kind="train", **more):
    return {
        "kind": kind,
        "step": step,
        "time": 1e9 + step,
        "loss/total": 10.0 / (step + 1),
        "keep_rate": 0.5,
    } | more


def run_of(folder, store, name="one"):
    (folder / "kvcat").mkdir(parents=True, exist_ok=True)
    return MlflowRun(folder / "kvcat", uri=store, experiment="kvcat", name=name)


def train(folder, store, start, stop, *, sent=None):
    """What a training process does for steps start+1 … stop; of its figures the store gets those up to `sent`."""
    sent = stop if sent is None else sent
    run = run_of(folder, store)
    file = MetricsFile(folder / "kvcat" / "metrics.jsonl", resumed_at=start)
    box = Outbox(run, name="MLflow", first_retry=0.01)
    for step in range(start + 1, stop + 1):
        if step == sent + 1:
            assert box.close(60) == 0  # from here on the store gets nothing
        new = line(step, lr=0.1)
        file.write("train", step, {k: v for k, v in new.items() if k not in ("kind", "step")})
        if step <= sent:
            box.put(figures_of(new))
    assert box.close(60) == 0
    return run


def only_run(store):
    client = client_of(store)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) == 1
    return client, runs[0]


def steps(client, run, name):
    return [m.step for m in client.get_metric_history(run.info.run_id, name)]


def test_one_run_over_requeues_and_no_step_twice(store, tmp_path):
    folder = tmp_path / "run"
    train(folder, store, 0, 12, sent=12)
    client, run = only_run(store)
    client.set_terminated(run.info.run_id, "KILLED")
    train(folder, store, 10, 20)  # its last checkpoint was step 10: 11 and 12 are made again
    client, run = only_run(store)
    assert steps(client, run, "train/loss/total") == list(range(1, 21))
    assert run.info.status == "RUNNING" and run.info.run_name == "one"
    assert json.loads((folder / "kvcat" / RUN_FILE).read_text())["run_id"] == run.info.run_id


def test_what_a_killed_process_did_not_send_comes_at_the_next_start(store, tmp_path):
    folder = tmp_path / "run"
    train(folder, store, 0, 12, sent=6)
    assert steps(*only_run(store), "train/keep_rate") == list(range(1, 7))
    train(folder, store, 12, 15)
    assert steps(*only_run(store), "train/keep_rate") == list(range(1, 16))


def test_a_process_that_is_killed_while_it_makes_a_database_spoils_none(tmp_path):
    """MLflow's tables come one by one, and it refuses a database that has some of them."""
    path = tmp_path / "mlflow.db"
    code = (
        "import os, sys, mlflow.store.db.utils as u\n"
        "u._upgrade_db = lambda engine: os.kill(os.getpid(), 9)\n"
        "from kvcat_nemo.tracking.mlflow_run import client_of\n"
        "client_of(sys.argv[1]).search_experiments()\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, f"sqlite:///{path}"], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert not path.exists() and [p for p in tmp_path.iterdir() if ".partial-" in p.name]
    train(tmp_path / "run", f"sqlite:///{path}", 0, 2)
    client, run = only_run(f"sqlite:///{path}")
    assert steps(client, run, "train/lr") == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlflow.db", "run"]


def test_a_lost_answer_makes_no_second_run(store, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    create, lost = MlflowClient.create_run, []

    def create_and_lose(self, *args, **options):
        create(self, *args, **options)
        if not lost:
            lost.append(1)
            raise TimeoutError("no answer")
        raise AssertionError("a second run")

    monkeypatch.setattr(MlflowClient, "create_run", create_and_lose)
    train(tmp_path / "run", store, 0, 3)
    assert lost and steps(*only_run(store), "train/loss/total") == [1, 2, 3]


def test_a_lost_answer_to_figures_doubles_none(store, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    log, lost = MlflowClient.log_batch, []

    def log_and_lose(self, *args, **options):
        log(self, *args, **options)
        if len(lost) < 3:
            lost.append(1)
            raise TimeoutError("no answer")

    monkeypatch.setattr(MlflowClient, "log_batch", log_and_lose)
    for start in (0, 2, 4):
        train(tmp_path / "run", store, start, start + 2)
    assert len(lost) == 3 and steps(*only_run(store), "train/loss/total") == list(range(1, 7))


def test_a_request_that_arrives_late_doubles_none(store, tmp_path):
    """The same figures, sent by one who does not know that they are there."""
    run = train(tmp_path / "run", store, 0, 3)
    run._last = {}
    run.catch_up()
    assert steps(*only_run(store), "train/loss/total") == [1, 2, 3]


def test_another_store_gets_the_whole_history(store, tmp_path, empty_database):
    folder = tmp_path / "run"
    train(folder, store, 0, 5)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_database, other / "mlflow.db")
    train(folder, f"sqlite:///{other / 'mlflow.db'}", 5, 8)
    assert steps(*only_run(f"sqlite:///{other / 'mlflow.db'}"), "train/loss/total") == list(range(1, 9))
    train(folder, store, 8, 9)  # and back
    assert steps(*only_run(store), "train/loss/total") == list(range(1, 10))


def test_params_stay_and_changes_are_tagged(store, tmp_path):
    folder = tmp_path / "run"
    run = train(folder, store, 0, 1)
    params = {f"model.field{i}": i for i in range(250)} | {
        "plugins[0].x": "y" * 7000,
        "trainer.max_steps": 40,
    }
    run.log_params(params)
    again = train(folder, store, 1, 2)
    again.log_params(params | {"trainer.max_steps": 80, "new": None})
    client, found = only_run(store)
    assert len(found.data.params) == 253
    assert found.data.params["plugins_0_.x"] == "y" * 6000 and found.data.params["new"] == "None"
    assert found.data.params["trainer.max_steps"] == "40"
    assert json.loads(found.data.tags[CHANGED_TAG]) == {"trainer.max_steps": ["40", "80"]}


def test_no_credentials_in_the_store(store, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef123456")
    run = train(tmp_path / "run", store, 0, 1)
    run.log_params(
        {"a.password": "hunter22", "data.url": "https://u:pw1234@host/x", "note": "is hf_abcdef123456"}
    )
    _, found = only_run(store)
    assert found.data.params == {"a.password": "***", "data.url": "https://***@host/x", "note": "is ***"}


def test_files_lie_beside_the_database_wherever_one_starts(store, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = train(tmp_path / "run", store, 0, 1)
    (tmp_path / "config.yaml").write_text("a: 1\n")
    run.log_files([tmp_path / "config.yaml", tmp_path / "missing.png"])
    client, found = only_run(store)
    assert [f.path for f in client.list_artifacts(found.info.run_id)] == ["config.yaml"]
    assert list((tmp_path / "mlruns").rglob("config.yaml")) and not list((tmp_path / "elsewhere").iterdir())


def test_a_refused_figure_does_not_stop_the_others(store, tmp_path, caplog):
    run = run_of(tmp_path / "run", store)
    box = Outbox(run, name="MLflow", first_retry=0.01)
    box.put([Figure("bad\nname", 1.0, 1, 1), Figure("fine", 1.0, 1, 1), Figure("wrong", 1.0, 1.5, 1)])
    box.do(lambda: run.log_params({"a": 1}))
    box.put([Figure("good", 1.0, 1, 1)])
    assert box.close(60) == 0
    client, found = only_run(store)
    assert {"good", "fine"} <= set(found.data.metrics) and "refused" in caplog.text


def test_system_metrics_count_on(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    seen = 0
    for _ in range(2):
        box = Outbox(run_of(tmp_path / "run", store), name="MLflow")
        sampler = SystemSampler(box)
        sampler.start()
        time.sleep(1.0)
        sampler.stop()
        assert box.close(60) == 0
        client, run = only_run(store)
        at = steps(client, run, PREFIX + "cpu_utilization_percentage")
        assert at == list(range(len(at))) and len(at) > seen
        seen = len(at)
    assert {"system/system_memory_usage_megabytes", "system/disk_available_megabytes"} <= set(
        run.data.metrics
    )


def test_brought_afterwards(store, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    train(folder, store, 0, 4, sent=2)
    (folder / "kvcat" / "config.json").write_text(
        '{"trainer": {"max_steps": 4}, "model": {"kvcat": {"policy": "router"}}}'
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    for _ in range(2):
        run_id, where = bring(folder)
        client, run = only_run(store)
        assert (run_id, where) == (run.info.run_id, store) and run.info.status == "KILLED"
        assert steps(client, run, "train/loss/total") == [1, 2, 3, 4]
    assert run.data.params["model.kvcat.policy"] == "router"
    (folder / "kvcat" / "finished.json").write_text('{"step": 4}')
    bring(folder)
    assert only_run(store)[1].info.status == "FINISHED"


@pytest.fixture
def exported(tmp_path):
    """A plain Hugging Face model as `kvcat export` writes it, of two tiny layers."""
    from tests.support.hf_models import save_model

    return save_model(tmp_path / "hf", num_hidden_layers=2)


def test_the_exported_model_is_registered(store, tmp_path, monkeypatch, exported):
    """Under the training's run, as something that MLflow itself loads; the run's end stays what it was."""
    import mlflow
    import torch

    folder = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with pytest.raises(ValueError, match="belongs to no run"):
        register_model(exported, "tiny", run=folder)
    run = train(folder, store, 0, 2)
    client_of(store).set_terminated(run.run_id, "FINISHED")
    checkpoint = folder / "checkpoints" / "step=2"
    checkpoint.mkdir(parents=True)
    assert [register_model(exported, "tiny", run=place) for place in (folder, checkpoint)] == ["1", "2"]
    client, found = only_run(store)
    version = client.get_model_version("tiny", "1")
    assert version.run_id == run.run_id and found.info.status == "FINISHED"
    loaded = mlflow.transformers.load_model("models:/tiny/1").model
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert all(torch.equal(before[k], v) for k, v in loaded.state_dict().items())


def test_bringing_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:s3cret-word@127.0.0.1:9")
    with pytest.raises(ValueError, match="no training run's folder"):
        bring(tmp_path)
    (tmp_path / "kvcat").mkdir()
    (tmp_path / "kvcat" / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    with pytest.raises(ValueError, match="127.0.0.1") as error:
        bring(tmp_path)
    assert "s3cret-word" not in str(error.value)
    with pytest.raises(ValueError, match="do not belong on a command line"):
        bring(tmp_path, uri="http://ann:s3cret-word@127.0.0.1:9")


def test_the_address_is_kept_without_credentials(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:s3cret%2Fword@host:5000/x")
    assert store_uri() == "http://host:5000/x" == os.environ["MLFLOW_TRACKING_URI"]
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "ann"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "s3cret/word"
    assert store_uri() == "http://host:5000/x" and os.environ["MLFLOW_TRACKING_USERNAME"] == "ann"


QUIET = """
import sys
seen = []
def hook(event, arguments):
    if event == "socket.connect":
        seen.append(str(arguments[1]))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        seen.append(str(arguments[0]))
sys.addaudithook(hook)
import time
from pathlib import Path
from kvcat_nemo.tracking.mlflow_run import MlflowRun
from kvcat_nemo.tracking.outbox import Figure, Outbox
run = MlflowRun(Path(sys.argv[1]), uri=sys.argv[2], experiment="kvcat", name="quiet")
box = Outbox(run, name="MLflow")
box.put([Figure("loss", 1.0, 1, 1)])
box.do(lambda: run.end("FINISHED"))
assert box.close(60) == 0
time.sleep(2)  # MLflow's own reports leave by a thread
print("SEEN", seen)
"""


# What MLflow takes for a test or a CI and then stays silent by itself; and what would lead around the dead proxy.
SIGNS = tuple(
    [
        "PYTEST_",
        "CI",
        "GITHUB_",
        "GITLAB_",
        "JENKINS_",
        "TRAVIS",
        "TF_BUILD",
        "BITBUCKET_",
        "CODEBUILD_",
        "BUILDKITE",
        "TEAMCITY_",
        "CLOUD_RUN_",
        "RUNBOT_",
        "MLFLOW_",
        "DO_NOT_TRACK",
        "KVCAT_TELEMETRY",
        "NO_PROXY",
        "ALL_PROXY",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ]
)


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_reported_to_anyone_unless_asked(store, tmp_path, asked):
    """Every connection and name that Python looks up, in a process that is no test to MLflow's eyes."""
    environment = {k: v for k, v in os.environ.items() if not k.upper().startswith(SIGNS)}
    environment |= {"KVCAT_TELEMETRY": "1"} if asked else {}
    # Nothing must really leave: a proxy that is not there, on the loopback.
    environment |= dict.fromkeys(("https_proxy", "http_proxy"), "http://127.0.0.1:9") | {"no_proxy": ""}
    command = [sys.executable, "-c", QUIET, str(tmp_path), store]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = done.stdout.partition("SEEN ")[2].strip()
    assert (seen != "[]") if asked else (seen == "[]"), seen
