"""A real MLflow server: killed and started again in the middle, and its page in a browser."""

from __future__ import annotations

import logging
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kvcat_nemo.runs.metrics_file import MetricsFile
from kvcat_nemo.tracking.mlflow_run import MlflowRun, client_of, figures_of, store_uri
from kvcat_nemo.tracking.outbox import Outbox

NAMES = (
    "loss/total",
    "loss/anchor",
    "loss/distill",
    "loss/budget",
    "keep_rate/group0",
    "keep_rate/group1",
    "tflops_per_gpu",
)


def figures(step):
    # Not straight: of points almost in a line, plotly draws the ends alone.
    return {name: i + math.cos(step) for i, name in enumerate(NAMES)} | {"time": time.time()}


class Training:
    """What a training process does with its tracker: a line to the file, the same to the outbox, no waiting."""

    def __init__(self, folder, uri):
        (folder / "kvcat").mkdir(parents=True, exist_ok=True)
        self.run = MlflowRun(folder / "kvcat", uri=uri, experiment="kvcat", name=folder.name)
        self.box = Outbox(self.run, name="MLflow", first_retry=0.2, last_retry=1.0)
        self.file = MetricsFile(folder / "kvcat" / "metrics.jsonl", resumed_at=10**9)
        self.slowest = 0.0

    def steps(self, *numbers, pause=0.0):
        for step in numbers:
            new = figures(step)
            self.file.write("train", step, new)
            started = time.perf_counter()
            self.box.put(figures_of({"kind": "train", "step": step} | new))
            self.slowest = max(self.slowest, time.perf_counter() - started)
            time.sleep(pause)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "kvcat" in r.name]


@pytest.mark.alone
@pytest.mark.slow
def test_a_server_killed_and_started_again(server, tmp_path, caplog, monkeypatch):
    """Steps before, during and after: all in one run, each once; the training never waits, and hears of it once."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("http://", "http://ann:s3cret-word@"))
    caplog.set_level(logging.INFO)
    job = Training(tmp_path / "killed", store_uri())
    job.steps(*range(1, 21))
    until(lambda: not job.box._queue)
    server.kill()
    job.steps(*range(21, 41), pause=0.1)
    assert len(job.box._queue) == 20 * len(NAMES)
    server.start()
    job.steps(*range(41, 51))
    until(lambda: not job.box._queue)
    job.box.do(lambda: job.run.log_files([tmp_path / "killed" / "kvcat" / "metrics.jsonl"]))
    job.box.do(lambda: job.run.end("FINISHED"))
    assert job.box.close(30) == 0
    assert job.slowest < 1  # seconds: a step that asked the killed server would wait for its time-out
    assert len(warnings(caplog)) == 1 and "training goes on" in warnings(caplog)[0]
    client = client_of(server.url)
    run = client.get_run(job.run.run_id)
    assert run.info.status == "FINISHED"
    for name in NAMES:
        history = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert [m.step for m in history] == list(range(1, 51))
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["metrics.jsonl"]
    assert "s3cret-word" not in caplog.text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"s3cret-word" not in path.read_bytes(), path


class Broken(BaseHTTPRequestHandler):
    """Answers every request with the server's `code`, or not at all."""

    def _reply(self):
        self.server.asked += 1
        if self.server.code is None:
            self.server.release.wait(60)
            return
        self.send_response(self.server.code)
        self.end_headers()
        self.wfile.write(b"trouble")

    do_GET = do_POST = do_PUT = _reply

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("code", [500, 503, 401, None])
def test_a_server_that_answers_badly_or_never(code, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    broken = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    broken.code, broken.release, broken.asked = code, threading.Event(), 0
    broken.daemon_threads = True
    threading.Thread(target=broken.serve_forever, daemon=True).start()
    try:
        job = Training(tmp_path / "run", f"http://127.0.0.1:{broken.server_address[1]}")
        job.steps(*range(1, 201))
        until(lambda: len(warnings(caplog)) == 1, seconds=30)
        started = time.monotonic()
        job.steps(*range(201, 401))
        assert job.box.close(1.0) == 400 * len(NAMES)
        # A step that waited for an answer would take the request's second, 200 of them 200 s.
        assert time.monotonic() - started < 100 and job.slowest < 1
        assert broken.asked >= 2 and len(warnings(caplog)) == 1
    finally:
        broken.release.set()
        broken.shutdown()
        broken.server_close()
    assert len(MetricsFile.lines(tmp_path / "run" / "kvcat" / "metrics.jsonl")) == 400


@pytest.mark.slow
def test_the_page_of_a_run(server, tmp_path):
    """What one sees in MLflow: charts of the named figures, parameters, files, system metrics."""
    from tests.tracking.browser import look

    job = Training(tmp_path / "seen", server.url)
    job.steps(*range(1, 41))
    job.box.do(lambda: job.run.log_params({"model.kvcat.policy": "router", "trainer.max_steps": 40}))
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  kvcat:\n    policy: router\n")
    job.box.do(lambda: job.run.log_files([config]))
    job.box.do(lambda: job.run.end("FINISHED"))
    assert job.box.close(60) == 0
    client = client_of(server.url)
    where = f"{server.url}/#/experiments/{client.get_run(job.run.run_id).info.experiment_id}/runs/{job.run.run_id}"

    async def visit(page):
        overview = await page.open(where, "model.kvcat.policy", "train/loss/distill", "Finished")
        await page.picture(tmp_path / "overview.png")
        charts = await page.open(f"{where}/model-metrics", *NAMES)
        drawn = await page.curves(len(NAMES), points=30)
        await page.picture(tmp_path / "charts.png")
        files = await page.open(f"{where}/artifacts", "config.yaml")
        return overview, charts, files, drawn

    # Tall, for MLflow draws only the charts in sight.
    overview, charts, _, drawn = look(tmp_path / "profile", visit, height=2400)
    assert "router" in overview and "seen" in overview
    for name in NAMES:
        assert name in charts
    assert sum(max(points, default=0) >= 30 for points in drawn.values()) == len(NAMES), drawn
    assert (tmp_path / "charts.png").stat().st_size > 20_000
